"""Second moments of experts with few tokens: their own, those of all experts' tokens, or the own ones shrunk to these.

    python benchmarks/expert_calibration.py --out benchmarks/results/expert-calibration.jsonl

Trains a small mixture of experts (Qwen3-MoE, a byte is a token) on Python's help topics, some minutes on one core, and
quantizes its experts with `gptq`, everything else stays float. For each number of calibration tokens, seed and way: the
KL divergence from the float model on held-out text. Each seed is another draw of calibration windows. Prints the mean
over seeds, relative to the experts' own tokens alone.
"""

import argparse
import json
import random
import time
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import mxcompile
from mxcompile.cli.texts import help_text
from mxcompile.diagnostics.evaluation import evaluate
from mxcompile.graph.program import Program
from mxcompile.pipeline.pipeline import Pipeline

LENGTH: Final = 128
TRAINED, CALIBRATED = 0.75, 0.9
"""The text is trained on up to the first share, calibration windows are from there up to the second, the rest tests."""
WAYS: Final = {
    "nearest": "round-weights{format=W}",
    "own": "gptq{format=W,shrinkage=0}",
    "shrinkage 0.5": "gptq{format=W,shrinkage=0.5}",
    "shrinkage 1": "gptq{format=W,shrinkage=1}",
    "shrinkage 2": "gptq{format=W,shrinkage=2}",
    "shrinkage 4": "gptq{format=W,shrinkage=4}",
    "shrinkage 8": "gptq{format=W,shrinkage=8}",
    "all": "gptq{format=W,experts=all}",
}
CONFIG: Final = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "norm_topk_prob": True,
    "use_cache": False,
}


def text_parts() -> tuple[Tensor, Tensor, Tensor]:
    """Bytes `[tokens]` to train on, to calibrate with and to test on."""
    topics = help_text().split("\n\n")
    random.Random(0).shuffle(topics)  # paragraphs, so that the parts are of one kind
    tokens = torch.tensor(list("\n\n".join(topics).encode()), dtype=torch.long)
    first, second = (int(share * len(tokens)) for share in (TRAINED, CALIBRATED))
    return tokens[:first], tokens[first:second], tokens[second:]


def trained(tokens: Tensor, steps: int) -> Qwen3MoeForCausalLM:
    """A model trained for so many steps."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    began, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    for step in range(steps):
        share = step / steps
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, step / 50) * (1 - share) + 1e-5
        ids = windows(tokens, 16, generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    return model.eval()


def windows(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random windows `[count, LENGTH]`."""
    starts = torch.randint(len(tokens) - LENGTH, (count,), generator=generator).tolist()
    return torch.stack([tokens[start : start + LENGTH] for start in starts])


class Experiment:
    """A float model, held-out windows, and the text that calibration windows are drawn from."""

    def __init__(self, model: Qwen3MoeForCausalLM, calibration: Tensor, test: Tensor, fmt: str) -> None:
        self.model, self._calibration, self._format = model, calibration, fmt
        self.test = test[: len(test) // LENGTH * LENGTH].view(-1, 1, LENGTH)
        ids = calibration[:LENGTH].unsqueeze(0)
        self._program = mxcompile.trace(model, {"input_ids": ids}, exclude=["*self_attn*"], allow_partial=True)

    def quantized(self, way: str, tokens: int, seed: int) -> tuple[Any, Program]:
        """The deployed model and its program, calibrated with so many tokens."""
        drawn = windows(self._calibration, tokens // LENGTH, torch.Generator().manual_seed(seed))
        pipeline = Pipeline.parse(f"{self.pipeline(way)} | lower-mx{{weight={self._format}}}")
        program = pipeline.run(self._program, [{"input_ids": batch} for batch in drawn.split(8)])
        return mxcompile.deploy(program, self.model), program

    def pipeline(self, way: str) -> str:
        """The passes of a way of `WAYS`, before lower-mx."""
        return WAYS[way].replace("=W", f"={self._format}")

    def record(self, way: str, tokens: int, seed: int) -> dict[str, Any]:
        """Scores of the model that was quantized in a way."""
        model, program = self.quantized(way, tokens, seed)
        scores = evaluate(model, list(self.test), self.model)
        counts = [each for record in program.ledger for each in record.expert_tokens.values()]
        by_expert = sorted(number for each in counts for number in each)
        return {
            "way": way,
            "pipeline": self.pipeline(way),
            "calibration_tokens": tokens,
            "expert_tokens": by_expert and [by_expert[0], round(median(by_expert)), by_expert[-1]],
            "seed": seed,
            "kl": scores.kl,
            "top1": scores.top1,
            "nll": scores.nll,
            "float_nll": scores.reference_nll,
            "test_tokens": scores.tokens,
        }


def print_means(console: Console, records: list[dict[str, Any]]) -> None:
    """A row for every number of tokens: the mean KL of each way over seeds, over that of own tokens alone."""
    table = Table("tokens", "of an expert: least, median, most", *WAYS)
    for tokens in dict.fromkeys(record["calibration_tokens"] for record in records):
        rows = [record for record in records if record["calibration_tokens"] == tokens]
        means = {way: mean(row["kl"] for row in rows if row["way"] == way) for way in WAYS}
        counts = next(row["expert_tokens"] for row in rows if row["way"] == "own")
        relative = [f"{value / means['own']:.2f}" for value in means.values()]
        table.add_row(str(tokens), ", ".join(map(str, counts)), *relative)
    console.print(f"KL over that of `own`, mean of {len({record['seed'] for record in records})} seeds")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="mxfp4", help="of the experts' weights")
    parser.add_argument("--steps", type=int, default=2000, help="training steps, of 16 windows")
    parser.add_argument("--tokens", default="256,1024,4096,16384", help="numbers of calibration tokens")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration windows")
    parser.add_argument("--windows", type=int, default=200, help="held-out windows")
    parser.add_argument("--out", type=Path, help="a .jsonl to append the records to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training, calibration, test = text_parts()
    model = trained(training, arguments.steps)
    experiment = Experiment(model, calibration, test[: arguments.windows * LENGTH], arguments.format)
    setting = {"model": {"type": "qwen3_moe", **CONFIG}, "text": "Python's help topics", "length": LENGTH}
    setting |= {"steps": arguments.steps, "format": arguments.format}
    console, records = Console(), list[dict[str, Any]]()
    for tokens in map(int, arguments.tokens.split(",")):
        for seed in range(arguments.seeds):
            for way in WAYS:
                records.append(experiment.record(way, tokens, seed))
                console.print(f"{tokens} tokens, seed {seed}, {way}: KL {records[-1]['kl']:.5f}")
                if arguments.out is not None:
                    with arguments.out.open("a") as out:
                        out.write(json.dumps(setting | records[-1]) + "\n")
    print_means(console, records)


if __name__ == "__main__":
    main()
