"""One engine of vLLM in a process of its own, for `serving.py`: times of decode steps and prompts, log-probabilities.

python benchmarks/serving_engine.py REQUEST.json RESULT.json
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

SETTINGS: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
COMPARED: Final = (4, 64)  # prompts, and their tokens
_LOG_LINES: Final = 200  # of an engine that failed, which are printed
_KERNEL: Final = re.compile(r"Using (\w+) for (MX\w+)")
_LATE: Final = re.compile(r"during inference: (\w+)")


class EngineProcess:
    """An engine on a folder, in a process of its own. asked: what `request` returns."""

    def __init__(self, model: Path, asked: Mapping[str, Any]) -> None:
        self._model, self._asked, self._process = model, asked, None
        names = ("request.json", "result.json", "log.txt", "ready", "go")
        self._question, self._answer, self._log, self._ready, self._go = (
            model.with_name(f"{model.name}.{name}") for name in names
        )

    def start(self) -> None:
        files = {"ready": str(self._ready), "go": str(self._go)} if self._asked["waits"] else {}
        self._question.write_text(json.dumps({"model": str(self._model), **self._asked, **files}))
        command = [sys.executable, __file__, str(self._question), str(self._answer)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, env=os.environ | SETTINGS, stdout=log, stderr=log)
        self._began = time.perf_counter()

    def wait_until_ready(self) -> None:
        """Until it waits to be measured, has ended, or had the time of `--limit`."""
        assert self._process is not None
        while not self._ready.exists() and self._process.poll() is None:
            if time.perf_counter() - self._began > self._asked["limit"]:
                self.stop()
            time.sleep(0.1)

    def measure(self) -> dict[str, Any]:
        """The measurements, and what the log says; `failed` has the end of the log of one that failed."""
        if self._process is None:
            self.start()
        self._go.touch()
        assert self._process is not None
        try:
            status = self._process.wait(self._asked["limit"])
        except subprocess.TimeoutExpired:
            self.stop()
            status = None
        printed = self._log.read_text(errors="replace")
        if status != 0 or not self._answer.exists():
            print(*printed.splitlines()[-_LOG_LINES:], sep="\n", file=sys.stderr, flush=True)
            why = f"stopped after {self._asked['limit']:.0f} s" if status is None else f"status {status}"
            return {"failed": f"{why}: {printed[-1500:]}"}
        return {**json.loads(self._answer.read_text()), **from_log(printed)}

    def stop(self) -> None:
        """End the process if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()


def from_log(printed: str) -> dict[str, Any]:
    """What vLLM says of kernels: the ones it chose, and those that were compiled while it served."""
    kernels = sorted({f"{name} ({kind})" for name, kind in _KERNEL.findall(printed)})
    return {"kernels": kernels, "compiled_late": sorted(set(_LATE.findall(printed)))}


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: times of one engine."""
    import torch
    import vllm
    from vllm import LLM

    began = time.perf_counter()
    most = max(max(asked["batches"]) * asked["prompt"], asked["long"])
    sizes = sorted({1, 2, 4, *asked["batches"]})
    options: dict[str, Any] = {"enforce_eager": True}
    if not asked["eager"]:
        options = {"compilation_config": {"cudagraph_capture_sizes": sizes}}
    options |= {"max_num_batched_tokens": most, "max_num_seqs": max(asked["batches"])} | asked["options"]
    engine = LLM(
        asked["model"],
        skip_tokenizer_init=True,
        tensor_parallel_size=asked["tensor_parallel"],
        max_model_len=max(asked["long"], asked["prompt"] + 2 * asked["steps"], COMPARED[1]) + 8,
        enable_prefix_caching=False,
        **options,
    )
    ready = time.perf_counter() - began
    if asked["waits"]:
        Path(asked["ready"]).touch()
        while not Path(asked["go"]).exists():
            time.sleep(0.05)
    steps = {str(batch): round(step_ms(engine, asked, batch), 3) for batch in asked["batches"]}
    long = ids(1, asked["long"], asked["vocabulary"])
    prompt = min(call_seconds(engine, long, 1) for _ in range(asked["rounds"] + 1))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    profiles = {str(batch): step_kernels(engine, asked, batch) for batch in asked["profile"]}
    profiles |= {"prompt": kernels(lambda: call_seconds(engine, long, 1), 1)} if profiles else {}
    return {
        **{"step_ms": steps, "prompt_ms": round(prompt * 1e3, 2), "ready_seconds": round(ready, 1)},
        **{name: asked[name] for name in ("prompt", "long", "steps", "rounds", "eager", "tensor_parallel")},
        **{"device": device, "vllm": vllm.__version__, "torch": torch.__version__},
        **({"kernel_us": profiles} if profiles else {}),
        **({"log_probabilities": of_prompts(engine, asked["vocabulary"])} if asked["compare"] else {}),
    }


def of_prompts(engine: Any, vocabulary: int) -> list[list[float]]:
    """An engine's log-probabilities of the compared prompts' tokens from the second on."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": each} for each in ids(*COMPARED, vocabulary)]
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    results = engine.generate(prompts, sampling, use_tqdm=False)
    return [
        [entry[token].logprob for token, entry in zip(each.prompt_token_ids[1:], each.prompt_logprobs[1:], strict=True)]
        for each in results
    ]


def step_ms(engine: Any, asked: Mapping[str, Any], batch: int) -> float:
    """Milliseconds of a decode step: of a long call less a short one."""
    prompts = ids(batch, asked["prompt"], asked["vocabulary"])
    short, long = 2, 2 + asked["steps"]
    call_seconds(engine, prompts, short)
    times = {
        count: min(call_seconds(engine, prompts, count) for _ in range(asked["rounds"])) for count in (short, long)
    }
    return (times[long] - times[short]) / asked["steps"] * 1e3


def step_kernels(engine: Any, asked: Mapping[str, Any], batch: int) -> dict[str, float]:
    """Microseconds of a decode step's kernels: of a long call less a short one."""
    prompts = ids(batch, asked["prompt"], asked["vocabulary"])
    short = kernels(lambda: call_seconds(engine, prompts, 2), 0)
    long = kernels(lambda: call_seconds(engine, prompts, 2 + asked["steps"]), 0)
    step = {name: round((us - short.get(name, 0.0)) / asked["steps"], 1) for name, us in long.items()}
    return {name: us for name, us in sorted(step.items(), key=lambda each: -each[1]) if us >= 1}


def kernels(call: Callable[[], Any], least: float) -> dict[str, float]:
    """Microseconds by kernel of a GPU, or operator of a CPU, in a call, the longest first; `all` is their sum."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    times = dict[str, float]()
    for each in profiler.key_averages():
        name = each.key[:60]
        us = each.self_device_time_total if on_gpu else each.self_cpu_time_total
        times[name] = times.get(name, 0.0) + us
    longest = sorted(times.items(), key=lambda each: -each[1])
    return {"all": round(sum(times.values()), 1)} | {name: round(us, 1) for name, us in longest if us >= least}


def call_seconds(engine: Any, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Seconds in which the engine generates that many tokens for each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    results = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    generated = [len(result.outputs[0].token_ids) for result in results]
    if generated != [tokens] * len(prompts):
        raise RuntimeError(f"the engine generated {generated} tokens, not {tokens} for each prompt")
    return seconds


def ids(batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random prompts, the same for every engine."""
    import torch

    generator = torch.Generator().manual_seed(batch)
    return torch.randint(100, vocabulary, (batch, length), generator=generator).tolist()


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
    sys.stdout.flush()
    os._exit(0)  # vLLM would wait for its workers' processes, which end with this one
