"""Layers that vLLM always runs in float, such as routers and `shared_expert_gate`, with MX weights in the checkpoint.

    load_weights: "mlp.shared_expert_gate.weight", packed  ->  the same name, decoded

vLLM's models give these layers no quantization method, so their weights are decoded while they are loaded. They have
the values that were measured; the rounding of the layers' inputs is left out.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

logger = logging.getLogger(f"vllm.{__name__}")


@dataclass
class DecodingMapper(WeightsMapper):
    """vLLM's mapper of names, which also replaces some tensors. It stays one when vLLM joins it with its own mappers.

    decoded: stored name of a tensor -> what makes the one to load in its place.
    """

    decoded: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict[str, Callable[[], Tensor]])

    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        return self._joined(super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> WeightsMapper:
        return self._joined(WeightsMapper.__or__(other, self))

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The tensors under their new names."""
        return super().apply(self._decode(weights))

    def _decode(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            make = self.decoded.get(name)
            yield name, tensor if make is None else make()

    def _joined(self, names: WeightsMapper) -> WeightsMapper:
        parts: dict[str, Any] = {each.name: getattr(names, each.name) for each in fields(WeightsMapper)}
        return DecodingMapper(**parts, decoded=self.decoded)


def decoding_mapper(
    names: WeightsMapper, left: Mapping[str, str], float_weight: Callable[[str], Tensor]
) -> WeightsMapper:
    """A mapper with these names, which decodes layers that are left in float. left: layer -> stored name."""
    if not left:
        return names
    some = ", ".join(list(left)[:3]) + (" and others" if len(left) > 3 else "")
    logger.warning("vLLM runs %s in float: their weights are decoded, their inputs are not quantized", some)
    parts: dict[str, Any] = {each.name: getattr(names, each.name) for each in fields(WeightsMapper)}
    return DecodingMapper(**parts, decoded={stored: partial(float_weight, stored) for stored in left.values()})
