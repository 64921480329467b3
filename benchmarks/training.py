"""What training needs and gains: LoRA on packed weights (QLoRA), and float weights that round (QAD), on a GPU.

    python benchmarks/training.py --text wikitext2-validation.txt --device cuda --out ...

`lora:RECIPE`: SmolLM2-135M-Instruct in bfloat16, quantized unless the recipe is empty, gradient checkpointing; LoRA of
rank 16 on all linears of the layers, in float32, is trained on the first half of a text by cross-entropy, and judged by
the loss on the second half. `bound` is the model's bytes and 16 for each value of the adapters, `activation_bytes` what
the peak of the memory that torch has given out exceeds it by. `kl` are those of `merge_adapters`. `qad:RECIPE`: all
weights in float32, without checkpointing, towards the float model's predictions.
"""

import argparse
import copy
import gc
import json
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mxcompile
from mxcompile.calibration.data.windows import token_ids, token_windows
from mxcompile.cli import smollm2
from mxcompile.cli.texts import read_text
from mxcompile.numerics.metrics import kl_divergence
from mxcompile.tensor.modules import stored_bytes
from mxcompile.tensor.weight import unfused_matmuls

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    a = parser().parse_args()
    model, tokenizer = smollm2.load(torch.float32)
    model = model.to(a.device)
    windows = list(islice(token_windows(token_ids(tokenizer, read_text(Path(a.text))), a.length), 2 * a.windows))
    batches = [torch.stack(windows[i : i + a.batch]).view(a.batch, -1) for i in range(0, len(windows), a.batch)]
    batches = [batch.to(a.device) for batch in batches]
    half = len(batches) // 2
    for way in a.ways.split(","):
        started = time.perf_counter()
        kind, _, recipe = way.partition(":")
        print(way, file=sys.stderr, flush=True)
        run = trained_adapters if kind == "lora" else distilled
        for row in run(model, recipe, batches[:half], batches[half:], a):
            write({"way": way, **row, "seconds": round(time.perf_counter() - started, 1)}, a.out)


def trained_adapters(model: Any, recipe: str, train: list[Tensor], test: list[Tensor], a: argparse.Namespace) -> Any:
    """LoRA on the model, quantized by a recipe or as it is."""
    base: Any = copy.deepcopy(model).bfloat16()
    if recipe:
        base = mxcompile.quantize_and_compile(base, {"input_ids": train[0][:1, :64]}, recipe=recipe, compile=False)
    torch.manual_seed(0)
    size = stored_bytes(base)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS)))
    values = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    before = loss_of(adapted, test)
    peak, losses, step_ms = loop(adapted, train, lambda tokens: adapted(input_ids=tokens, labels=tokens).loss, 1e-3, a)
    row = {"model_bytes": size, "adapter_values": values, "peak_bytes": peak, "bound": size + 16 * values}
    row |= {"activation_bytes": peak - size - 16 * values, "step_ms": step_ms, "losses": losses}
    yield row | {"test_before": before, "test_after": loss_of(adapted, test)}
    if recipe:
        for gptq in (False, True):
            result = mxcompile.merge_adapters(
                copy.deepcopy(adapted), [{"input_ids": tokens} for tokens in train[:8]], gptq=gptq
            )
            kls, merged = [result.kl_before, result.kl_after], loss_of(result.model, test)
            yield {"merged": len(result.merged), "gptq": gptq, "kl": kls, "test_merged": merged}


def distilled(model: Any, recipe: str, train: list[Tensor], test: list[Tensor], a: argparse.Namespace) -> Any:
    """All weights, towards the float model's predictions."""
    prepared: Any = mxcompile.prepare_training(model, {"input_ids": train[0][:1, :64]}, recipe)
    size = stored_bytes(prepared)

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            expected = model(input_ids=tokens).logits.log_softmax(-1).flatten(0, 1)
        actual = prepared(input_ids=tokens).logits.log_softmax(-1).flatten(0, 1)
        return F.kl_div(actual, expected, log_target=True, reduction="batchmean")

    before = kl_of(model, prepared, test)
    peak, losses, step_ms = loop(prepared, train, loss, 1e-4, a)
    deployed: Any = mxcompile.finish_training(prepared)
    prepared.eval()
    with torch.no_grad(), unfused_matmuls():
        equal = torch.equal(prepared(input_ids=test[0]).logits, deployed(input_ids=test[0]).logits)
    row = {"model_bytes": size, "peak_bytes": peak, "step_ms": step_ms, "losses": losses, "equal_bits": equal}
    yield row | {"kl_before": before, "kl_after": kl_of(model, deployed, test)}


def loop(model: nn.Module, batches: list[Tensor], loss_of_batch: Any, rate: float, a: argparse.Namespace) -> Any:
    """(peak bytes, mean losses of the first and last four steps, milliseconds a step)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = list[float]()
    model.train()
    if a.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    outside = held(a.device) - stored_bytes(model)
    started = 0.0
    for step, tokens in enumerate(islice(cycle(batches), a.steps)):
        started = time.perf_counter() if step == 2 else started
        loss = loss_of_batch(tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}: {losses[-1]:.4f}", file=sys.stderr, flush=True)
    step_ms = (time.perf_counter() - started) / max(1, a.steps - 2) * 1e3
    peak = torch.cuda.max_memory_allocated() - outside if a.device == "cuda" else 0
    return peak, [sum(part) / len(part) for part in (losses[:4], losses[-4:])], round(step_ms, 1)


def held(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


@torch.no_grad()
def loss_of(model: nn.Module, batches: list[Tensor]) -> float:
    model.eval()
    return sum(model(input_ids=tokens, labels=tokens).loss.item() for tokens in batches) / len(batches)


@torch.no_grad()
def kl_of(model: nn.Module, other: nn.Module, batches: list[Tensor]) -> float:
    other.eval()
    kls = [kl_divergence(model(input_ids=t).logits, other(input_ids=t).logits) for t in batches]
    return sum(kls) / len(kls)


def write(row: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(row), flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--text", required=True)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--ways", default="lora:w8a8-mxint-quick,lora:w4a16-mxfp-quick,lora:,qad:w4a4-mxfp-quick")
    made.add_argument("--windows", type=int, default=32, help="in each half of the text")
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--steps", type=int, default=24)
    made.add_argument("--out", type=Path)
    return made


if __name__ == "__main__":
    main()
