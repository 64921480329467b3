"""An engine of vLLM in a process of its own.

    python tests/engines.py REQUEST.json RESULT.json

`log_probabilities` starts that. vLLM keeps state in its process, so one process runs one engine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from served import VOCABULARY
from torch import Tensor, nn

LIMIT: Final = 300  # seconds for a process; alone it takes about 20
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

    Engines on folders with one parent share vLLM's cache of compiled graphs.
    """
    request, result = folder.with_suffix(".request.json"), folder.with_suffix(".result.json")
    request.write_text(json.dumps({"model": str(folder), "ids": ids.tolist(), "options": options}))
    result.unlink(missing_ok=True)
    arguments = [sys.executable, __file__, str(request), str(result)]
    environment = os.environ | SETTINGS | (settings or {}) | {"VLLM_CACHE_ROOT": str(folder.parent / "vllm-cache")}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    printed = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(printed)
    return {**json.loads(result.read_text()), "printed": printed}


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Run one engine."""
    from vllm import LLM, SamplingParams

    options = {"enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True, **request["options"]}
    if torch.cuda.is_available():
        options.setdefault("gpu_memory_utilization", _SHARE_OF_GPU)
    engine = LLM(request["model"], **options)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    results = engine.generate([{"prompt_token_ids": ids} for ids in request["ids"]], sampling, use_tqdm=False)
    values = [
        [
            entry[token].logprob
            for token, entry in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
        ]
        for result in results
    ]
    return {"log_probabilities": values}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
