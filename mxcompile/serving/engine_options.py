"""What the layers need to know of how vLLM was started, and the check of a checkpoint's files before they are loaded.

    --additional-config '{"mxcompile": {"verify": false}}'

skips the checksums of the tensors. Those of config.json and of the index are always checked.
"""

from dataclasses import dataclass
from typing import Any, Final

from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger

from mxcompile.errors import CheckpointError
from mxcompile.serving.stored_model import StoredModel

logger = init_logger(f"vllm.{__name__}")
_SECTION: Final = "mxcompile"


@dataclass(frozen=True)
class EngineOptions:
    """dummy: no weights are loaded (`--load-format dummy`). cache: the folder of downloads (`--download-dir`).
    most_tokens, most_sequences: of one step. verify: whether to check the tensors' bytes; one process of each machine
    does."""

    dummy: bool
    cache: str | None
    most_tokens: int
    most_sequences: int
    verify: bool

    def check_once(self, stored: StoredModel) -> None:
        """Raise CheckpointError if the bytes of the checkpoint's tensors have changed; asked again, do nothing."""
        stored.cache = self.cache
        if not self.verify or stored.checked:
            return
        stored.check_tensors()
        logger.info("mxcompile: the checksums of %s are right", stored.source)


def current() -> EngineOptions:
    """The options of the engine that is building a model."""
    config = get_current_vllm_config()
    loading = config.load_config
    dummy = loading.load_format == "dummy"
    verify = _verify(config.additional_config) and not dummy and get_world_group().local_rank == 0
    scheduling = config.scheduler_config
    return EngineOptions(
        dummy, loading.download_dir, scheduling.max_num_batched_tokens, scheduling.max_num_seqs, verify
    )


def _verify(additional: Any) -> bool:
    """Whether checksums are wanted; raises CheckpointError for options that do not exist."""
    ours: Any = additional.get(_SECTION, {}) if isinstance(additional, dict) else {}
    if not isinstance(ours, dict) or set(ours) - {"verify"} or not isinstance(ours.get("verify", True), bool):
        raise CheckpointError(f'mxcompile\'s options are {ours!r}: the only one is {{"verify": true or false}}')
    return ours.get("verify", True)
