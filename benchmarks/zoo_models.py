"""The architectures of `architectures.py` and others that people quantize: `ZOO`, by kind, with inputs that fit them.

`build("llava")` and `inputs("llava", batch=3)` are as in `architectures.py`: tiny, with random weights, the same bits
every time, and nothing is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import architectures
import zoo_media
import zoo_modules
import zoo_texts
from architectures import ARCHITECTURES, Draw, made
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """An architecture: how to make it, keyword arguments for its forward, and a prompt if it is another."""

    kind: str
    make: Callable[[], nn.Module]
    inputs: Callable[[Draw], dict[str, Tensor]]
    prompt: Callable[[Draw], dict[str, Tensor]] | None = None


def _known(name: str, draw: Draw) -> dict[str, Tensor]:
    return architectures.inputs(name, draw.batch, draw.length, draw.seed)


def _text(draw: Draw) -> dict[str, Tensor]:
    return {"input_ids": draw.ids(), "attention_mask": draw.mask()}


def _text_to_text(draw: Draw) -> dict[str, Tensor]:
    return {**_text(draw), "decoder_input_ids": draw.ids()}


_FIRST_OF_KIND: Final = {
    **{"llama": "decoder", "mixtral": "mixture of experts", "mamba": "state space, linear attention"},
    **{"bert": "encoder", "t5": "encoder-decoder", "whisper": "sound", "vit": "image", "clip": "vision-language"},
}
"""Of the kinds that follow one another in `ARCHITECTURES`."""


def _zoo() -> dict[str, Entry]:
    zoo: dict[str, Entry] = {}
    kind = ""
    for name, make in ARCHITECTURES.items():
        kind = _FIRST_OF_KIND.get(name, kind)
        zoo[name] = Entry(kind, make, partial(_known, name))
    for kind, makers in zoo_texts.TEXTS.items():
        zoo |= {name: Entry(kind, make, _text) for name, make in makers.items()}
    zoo |= {name: Entry("encoder-decoder", make, _text_to_text) for name, make in zoo_texts.ENCODER_DECODERS.items()}
    for kind, entries in (
        ("vision-language", zoo_media.VISION_LANGUAGE),
        ("sound", zoo_media.SOUND),
        ("image", zoo_media.IMAGES),
        ("time series", zoo_media.TIME_SERIES),
        ("diffusion", zoo_modules.DIFFUSION),
        ("modules of PyTorch", zoo_modules.MODULES),
    ):
        zoo |= {name: Entry(kind, make, arguments) for name, (make, arguments) in entries.items()}
    for name in zoo_media.TRACED_WITHOUT_IMAGE:
        zoo[f"{name}_text"] = Entry(zoo[name].kind, zoo[name].make, _text, prompt=zoo[name].inputs)
    return zoo


ZOO: Final = _zoo()


def build(name: str) -> nn.Module:
    """A new model of that name, always with the same weights, float32, in eval mode."""
    return made(ZOO[name].make)


def inputs(name: str, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for the model's forward; `length` is the number of tokens of a text."""
    return ZOO[name].inputs(Draw(batch, length, seed))


def prompt(name: str) -> dict[str, Tensor]:
    """Keyword arguments for the model's `generate`."""
    entry = ZOO[name]
    arguments = (entry.prompt or entry.inputs)(Draw(batch=2, length=8, seed=0))
    return {key: value for key, value in arguments.items() if key != "decoder_input_ids"}
