"""An engine of vLLM in a process of its own.

vLLM keeps state in its process, so one process runs one engine. All are forked from a server that has imported vLLM,
which takes longer than what a tiny engine then does.
"""

import gc
import json
import multiprocessing
import os
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from unittest import mock

import torch
from served import VOCABULARY
from torch import Tensor, nn

LIMIT: Final = 300  # seconds for a process; alone it takes about 5
SETTINGS: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # FlashInfer is not among the packages that a test needs
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # NVLink multicast, which a shared host may not allow; so are the next two
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
_VLLMS_KERNELS: Final = ("MarlinMxFp4", "HummingMxFp4", "MarlinMxfp8", "EmulationMxfp8", "HummingMxfp8")
OUR_KERNELS: Final = {"VLLM_DISABLED_KERNELS": ",".join(f"{name}LinearKernel" for name in _VLLMS_KERNELS)}
"""Settings with which a GPU runs folders of compressed-tensors on our kernels."""
_SHARE_OF_GPU: Final = 0.08  # of its memory, for an engine: several run at a time
why_no_engine: Final = "" if find_spec("vllm") is not None else "vLLM is not installed in this environment"


def prompts(count: int = 4, length: int = 48) -> Tensor:
    """Token ids `[count, length]`."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def expected(model: nn.Module, ids: Tensor, attention: str = "sdpa") -> Tensor:
    """Log-probabilities of the prompts' tokens from the second on, `[count, length - 1]`, as transformers has them on
    the device that engines use. Moves the model there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).set_attn_implementation(attention)
    with torch.no_grad():
        values = torch.log_softmax(model(input_ids=ids.to(device)).logits[:, :-1].float(), dim=-1).cpu()
    return values.gather(2, ids[:, 1:, None])[..., 0]


def log_probabilities(folder: Path, ids: Tensor, **options: Any) -> Tensor:
    """The same from an engine that serves the folder. options: arguments of `vllm.LLM`. Raises RuntimeError with
    what the process printed if it fails."""
    return torch.tensor(run(folder, ids, **options)["log_probabilities"])


def run(folder: Path, ids: Tensor, settings: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """What an engine makes of prompts: `log_probabilities`, and `printed`, what its process has printed.

    settings: environment variables, beside `SETTINGS`. options: arguments of `vllm.LLM`.

    Raises RuntimeError with what the process printed if it fails or does not end within `LIMIT`.
    """
    log = folder.with_suffix(".log")
    _result(folder).unlink(missing_ok=True)
    options = {"enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True, **options}
    environment = {**SETTINGS, **(settings or {}), "VLLM_CACHE_ROOT": vllms_cache().name}
    process = _processes().Process(target=_serve, args=(environment, folder, ids.tolist(), options, log))
    process.start()
    process.join(LIMIT)
    process.kill()
    process.join()
    printed = log.read_text()
    if process.exitcode:
        raise RuntimeError(printed)
    return {"log_probabilities": json.loads(_result(folder).read_text()), "printed": printed}


def _result(folder: Path) -> Path:
    return folder.with_suffix(".result.json")


@cache
def vllms_cache() -> TemporaryDirectory[str]:
    """What all engines share: what vLLM knows of the classes of models, and the graphs that it has compiled."""
    return TemporaryDirectory(prefix="vllm-cache-")


@cache
def _processes() -> Any:
    """Starts processes that have imported vLLM, which reads some of the settings then."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "mxcompile"])
    with mock.patch.dict(os.environ, SETTINGS):
        forkserver.ensure_running()
    return context


def _serve(environment: Mapping[str, str], folder: Path, prompts: Any, options: dict[str, Any], log: Path) -> None:
    """Run one engine in this process, and write what it makes of the prompts."""
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    gc.freeze()  # vLLM collects often; what it has imported stays
    os.environ.update(environment)
    from vllm import LLM, SamplingParams

    if torch.cuda.is_available():
        options.setdefault("gpu_memory_utilization", _SHARE_OF_GPU)
    if options["enforce_eager"]:  # it compiles a function of its sampler all the same
        torch.compiler.set_stance("force_eager")
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # in the processes that it starts
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    results = LLM(str(folder), **options).generate(
        [{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False
    )
    values = [
        [entry[token].logprob for token, entry in zip(each.prompt_token_ids[1:], each.prompt_logprobs[1:], strict=True)]
        for each in results
    ]
    _result(folder).write_text(json.dumps(values))
