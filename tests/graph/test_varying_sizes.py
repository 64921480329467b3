"""Sizes that vary in a trace: all that torch can follow, in a reasonable time; images are traced at their size else."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mxcompile.errors import InputError
from mxcompile.graph.trace import trace


class Patches(nn.Module):
    """Image -> tokens `[batch, patches, 8]`, followed by those of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.table = nn.Conv2d(3, 8, 4, stride=4), nn.Embedding(16, 8)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return torch.cat((self.cut(self.patches(pixels)).flatten(2).mT, self.table(ids)), 1)

    def cut(self, image: Tensor) -> Tensor:
        return image


class Scaled(Patches):
    """Compares the height of an image with a float."""

    def cut(self, image: Tensor) -> Tensor:
        if image.shape[-1] % 0.5 != 0:
            raise ValueError("cannot be scaled")
        return image


class Windows(Patches):
    """Pads an image to whole windows, cuts it, and puts it together again, as Swin does in each layer."""

    def cut(self, image: Tensor) -> Tensor:
        for _ in range(2):
            padded = functional.pad(image, (0, -image.shape[-1] % 2, 0, -image.shape[-2] % 2))
            channels, height, width = padded.shape[1:]
            windows = padded.view(-1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
            windows = windows.contiguous().view(-1, channels, 2, 2).relu()
            image = windows.view(-1, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).contiguous()
            image = image.view(-1, channels, height, width)
        return image


def example(batch: int, side: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, side, side), torch.randint(0, 16, (batch, length))


def test_images_of_all_sizes():
    program = trace(Patches(), example(2, 8, 5))
    assert program(*example(3, 16, 7)).shape == (3, 16 + 7, 8)


@pytest.mark.parametrize(
    ("model", "batch"), [(Scaled, 1), (Scaled, 2), pytest.param(Windows, 2, marks=pytest.mark.slow)]
)
def test_images_of_one_size_with_texts_of_all_lengths(model, batch):
    program = trace(model(), example(batch, 8, 5))
    assert program(*example(3, 8, 7)).shape == (3, 4 + 7, 8)
    with pytest.raises(InputError, match=r"do not fit the traced graph .*== 8"):
        program(*example(3, 16, 7))
