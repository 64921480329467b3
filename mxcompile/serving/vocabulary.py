"""An embedding or output head of vLLM on packed weights; a tied head is the embedding itself.

The embedding decodes the rows that it looks up. For the matmul of a tied head a GPU has a planar copy of them: it is
one of the largest matmuls, and its weight is small in a few bits.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mxcompile.errors import CheckpointError
from mxcompile.ops import DEQUANTIZE
from mxcompile.serving.linear import MXCompileLinearMethod
from mxcompile.serving.packed_linear import PackedPart


class MXCompileHeadMethod(MXCompileLinearMethod):
    """Runs an output head; rows of zeros pad the vocabulary."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The embedding, which runs the head too. Raises CheckpointError if vLLM built it for float weights."""
        del layer
        if not isinstance(embed_tokens.quant_method, MXCompileEmbeddingMethod):
            raise CheckpointError(
                f"{self.prefix} shares its quantized weight with the embedding, but vLLM builds the embedding of this "
                "model for float weights: leave the head out when you quantize (it is by default)"
            )
        return embed_tokens

    def _most_rows(self) -> int:
        """A head reads the last token of each sequence: its outputs for all tokens would not fit into memory."""
        return self.options.most_sequences


class MXCompileEmbeddingMethod(MXCompileHeadMethod):
    """Looks up rows of a table, and runs the head that shares it; the layout is the head's."""

    def _place(self, layer: Any, whole: PackedPart) -> None:
        self._register(layer, [whole])
        if whole.elements.is_cuda:
            self._register(layer, self._for_kernels(whole), "head_weight")

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """The decoded rows of tokens: ids `[...]` to `[..., size]`."""
        rows = [F.embedding(input_, part) for part in (layer.weight.flatten(1), layer.weight_scales)]
        return DEQUANTIZE(*rows, self.layout.format, self.layout.size, self.dtype)
