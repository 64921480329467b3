"""What the processes of `rank_processes.py` do, one function each.

A function returns what a test compares. Everything is the same in all processes unless it depends on the number.
"""

import inspect
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import build, inputs
from transformers import AutoModelForCausalLM

import mxcompile
from mxcompile.calibration.learning.distillation import Distillation
from mxcompile.calibration.learning.schedule import Schedule
from mxcompile.calibration.learning.trained_tensors import TrainedVectors
from mxcompile.calibration.ranks.exchange import ranks_of
from mxcompile.calibration.ranks.process_group import alone, joined
from mxcompile.calibration.runs.altered_run import AlteredRun
from mxcompile.errors import InputError, MXCompileError
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program
from mxcompile.graph.records import PassResult
from mxcompile.graph.trace import trace
from mxcompile.pipeline.interfaces import FLOATING, Instrument, Pass, PipelineStep
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.mapped_tensors import MappedTensors
from mxcompile.tensor.weight import unfused_matmuls

FORMATS = "weight=mxint4,activation=mxint8"
GPTQ = "gptq{format=mxint4,activation=mxint8,correction=0.25}"
LOWER = f"lower-mx{{{FORMATS}}}"
LEARNED = f"awq-fold{{{FORMATS}}} | {GPTQ} | tune-vectors{{activation=mxint8,steps=4}} | {LOWER}"


def batches(*sizes: int, vocabulary: int = 128, padded: bool = True) -> list[dict[str, torch.Tensor]]:
    """Batches of those sizes, 16 tokens each; padded: the mask of the first hides some, that of the second all."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(0, vocabulary, (size, 16), generator=generator) for size in sizes]
    masks = [torch.ones_like(ids) for ids in made]
    if padded:
        masks[0][:, :5] = 0
        masks[1][:] = 0
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(made, masks, strict=True)]


def result(program: Program) -> dict[str, Any]:
    """The tensors that a program holds, and its record."""
    tensors = {name: program.stored(name) for name in program.parameter_names()}
    packed = {name: getattr(each, "elements", each).cpu() for name, each in tensors.items()}
    return {"tensors": packed, "ledger": [(r.name, r.rewrites, r.misses, r.seconds) for r in program.ledger]}


def quantized(model: str, pipeline: str, data: list[dict[str, torch.Tensor]]) -> Program:
    device = data[0]["input_ids"].device
    return Pipeline.parse(pipeline).run(trace(build(model).to(device), data[0]), data)


def learned_on_gpus() -> dict[str, Any]:
    """`learned`, each process with a GPU of its own."""
    return learned(own_gpu())


def own_gpu() -> str:
    return f"cuda:{torch.cuda.current_device()}"


def learned(device: str = "cpu") -> dict[str, Any]:
    """A decoder with every kind of pass, and a mixture of experts; padded batches of several sizes."""
    data = [{name: each.to(device) for name, each in batch.items()} for batch in batches(2, 1, 3, 2)]
    return {
        "llama": result(quantized("llama", LEARNED, data)),
        "mixtral": result(quantized("mixtral", f"{GPTQ} | {LOWER}", data)),
        "smooth": result(
            quantized("llama", f"smooth-quant | round-weights{{format=mxint4,weighted=true}} | {LOWER}", data)
        ),
        "searched": result(
            quantized("llama", f"smooth-quant{{alpha=none,{FORMATS},objective=block}} | rotate{{{FORMATS}}}", data)
        ),
    }


def trained() -> dict[str, Any]:
    """Losses of batches of several sizes, and vectors trained on them, of a rounded model."""
    data = batches(2, 3, 1, 4, padded=False)
    data[0]["attention_mask"][:, :5] = 0
    program = trace(build("llama"), data[0])
    rounded = Pipeline.parse("round-weights{format=mxint4}").run(program)
    with joined(torch.device("cpu")) as ranks:
        rounded.ranks = ranks
        names = [name for name in rounded.parameter_names() if rounded.tensor(name).dim() == 1]
        vectors = {name: rounded.tensor(name).detach() for name in names if rounded.is_parameter(name)}
        distillation = Distillation(rounded, AlteredRun(rounded, {}), program)
        inputs = [Inputs((), batch) for batch in data]
        losses = [distillation.mean_loss(vectors, [batch]) for batch in inputs]
        ((_, after),) = distillation.train(TrainedVectors(vectors), inputs, Schedule(4, 4e-3, 1))
    return {"losses": losses, "vectors": after}


def rounded_together() -> dict[str, Any]:
    """Weights trained on all batches in each step, and on one of them in each; batches of several sizes."""
    data = batches(2, 1, 3, 2, 1, padded=False)
    data[0]["attention_mask"][:, :5] = 0
    learn = "learn-rounding{format=mxint4,activation=mxint8,rate=0.1,"
    return {
        "all": result(quantized("llama", f"{learn}train=weights,start=nearest,steps=8,batch=4}} | {LOWER}", data)),
        "one": result(quantized("llama", f"{learn}steps=4}} | {LOWER}", data)),
    }


def few_batches() -> dict[str, Any]:
    """One batch: of several processes, some have none."""
    return {"llama": result(quantized("llama", LEARNED.replace("steps=4", "steps=0"), batches(2, padded=False)))}


@dataclass(frozen=True)
class Failing(Pass):
    """Raises an error in process 1, after the second segment has been reached."""

    error: str = "value"

    name = "failing"
    accepts = FLOATING

    def run(self, program: Program) -> PassResult:
        if dist.get_rank() == 1:
            if self.error == "exit":
                os._exit(3)
            if self.error == "signal":
                signal.raise_signal(signal.SIGINT)
            raise {"value": ValueError("no such thing"), "input": InputError("a bad batch")}[self.error]
        return PassResult(0)


def failures() -> dict[str, tuple[str, str]]:
    """How a run ends in this process if process 1 fails; after each, the process group is usable."""
    data = batches(1, 1, padded=False)
    program = trace(build("llama"), data[0])
    ends: dict[str, tuple[str, str]] = {}

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
            ends[name] = ("", "")
        except (Exception, KeyboardInterrupt) as error:
            text = " ".join([str(error), *getattr(error, "__notes__", ())])
            ends[name] = (type(error).__name__, text)

    for error in ("value", "input", "signal"):
        attempt(error, lambda error=error: Pipeline([Failing(error), *Pipeline.parse(GPTQ).passes]).run(program, data))
    own = batches(1, 1, padded=False)[dist.get_rank() :]
    attempt("other data", lambda: Pipeline.parse(GPTQ).run(program, own))
    attempt("other pipeline", lambda: Pipeline.parse([GPTQ, LOWER][dist.get_rank()]).run(program, data))
    with torch.random.fork_rng():
        torch.manual_seed(dist.get_rank())
        other = torch.nn.Sequential(torch.nn.Linear(32, 32))
    attempt("other model", lambda: Pipeline.parse(GPTQ).run(trace(other, torch.ones(2, 32)), torch.ones(2, 32)))
    attempt("instrument", lambda: Pipeline.parse(GPTQ).run(program, data, [_Broken()]))
    if dist.get_rank() == 1:
        with alone():
            attempt("alone", lambda: Pipeline.parse(GPTQ).run(program, data))
    attempt("files", lambda: mxcompile.quantize_files("no folder", "out"))
    with alone():
        attempt("files alone", lambda: mxcompile.quantize_files("no folder", "out"))
    attempt("afterwards", lambda: Pipeline.parse(GPTQ).run(program, data))
    return ends


class _Broken(Instrument):
    def before(self, program: Program, step: PipelineStep) -> None:
        raise InputError(f"only the first process calls this, and this is number {dist.get_rank()}")


def lost() -> str:
    """What process 0 says if process 1 ends without a word."""
    data = batches(1, 1, padded=False)
    try:
        Pipeline([Failing("exit"), *Pipeline.parse(GPTQ).passes]).run(trace(build("llama"), data[0]), data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@dataclass(frozen=True)
class Working(Pass):
    """Works and meets for a minute."""

    folder: Path

    name = "working"

    def run(self, program: Program) -> PassResult:
        ranks = ranks_of(program)
        (self.folder / f"{ranks.number}.started").touch()
        for _ in range(600):
            time.sleep(0.1)
            ranks.any(False)
        return PassResult(0)


def working(folder: Path) -> str:
    """How a long run ends."""
    data = batches(1, 1, padded=False)
    try:
        Pipeline([Working(folder)]).run(trace(build("llama"), data[0]), data)
    except BaseException as error:
        return type(error).__name__
    return ""


def exchanges_on_gpus() -> list[Any]:
    """`exchanges` of tensors on GPUs."""
    return exchanges(own_gpu())


def exchanges(device: str = "cpu") -> list[Any]:
    """Every kind of exchange, with odd sizes."""
    with joined(torch.device(device)) as ranks:
        number = ranks.number
        generator = torch.Generator().manual_seed(number)
        values = torch.randn(7, 5, generator=generator).to(device)
        total, at_last, transposed = values.clone(), values.clone(), values.clone().T
        ranks.sum(total)
        ranks.sum(transposed)
        ranks.sum_at(at_last, ranks.count - 1)
        rows = torch.arange(7 * 2).view(7, 2).to(device, torch.bfloat16)
        sent = torch.full((3,), float(number), dtype=torch.float16, device=device)
        ranks.broadcast(sent, 1)
        places = {str(each.device) for each in ranks.gather(values)}
        assert places == {device}, places
        return [
            values.cpu(),
            total.cpu(),
            transposed.T.cpu(),
            at_last.cpu(),
            ranks.collect(rows[ranks.rows(7)], 7).cpu(),
            sent.cpu(),
            ranks.map(lambda item: (item * item, number), [1, 2, 3, 4, 5]),
            ranks.gather({"number": number}),
            ranks.from_first(number),
            ranks.any(number == 1),
        ]


FROM_FILES = {
    "llama": f"awq-fold{{{FORMATS}}} | {GPTQ} | tune-vectors{{activation=mxint8,steps=2}} | {LOWER}",
    "mixtral": f"rotate{{{FORMATS}}} | {GPTQ} | {LOWER}",
}


def from_files(folder: Path) -> dict[str, Any]:
    """Models quantized from their files, every tensor in a file, and in memory; an error of one process; a run that is
    interrupted in process 1, and goes on.
    """
    plain = MappedTensors.__init__

    def init(self: MappedTensors, *args: Any, **options: Any) -> None:
        plain(self, *args, **options, smallest=1)

    MappedTensors.__init__ = init
    data, number = batches(2, 1, 3, 2), dist.get_rank()

    def run(kind: str, out: str, **options: Any) -> str:
        limits = {"weights_in_memory": 1, "states_in_memory": 1, "scratch": folder / f"scratch-{number}"}
        example, recipe = data[0], FROM_FILES[kind]
        arguments = {"recipe": recipe, "calibration": data} | limits | options
        try:
            mxcompile.quantize_checkpoint(folder / kind, example, folder / out, **arguments)
        except (MXCompileError, KeyboardInterrupt) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    ends: dict[str, Any] = {}
    for kind, recipe in FROM_FILES.items():
        if number == 0:
            build(kind).save_pretrained(folder / kind, max_shard_size="100KB")
        dist.barrier()
        ends[kind] = run(kind, f"{kind}-files")
        ends[f"{kind} written"] = (folder / f"{kind}-files" / "config.json").is_file()
        model = AutoModelForCausalLM.from_pretrained(folder / kind)
        made = mxcompile.quantize_and_compile(model, data[0], recipe=recipe, calibration=data, compile=False)
        if number == 0:
            mxcompile.save(made, folder / f"{kind}-memory")
    with_error = {"scratch": folder / "llama" / "config.json"} if number == 1 else {}
    ends["error"] = run("llama", "none", **with_error)
    interrupted = Interrupted(number == 0)
    ends["interrupt"] = run("llama", "resumed", resume=folder / "parts", instruments=[interrupted])
    ends["parts"] = sorted(path.name for path in (folder / "parts").glob("*.json"))
    ends["resumed"] = run("llama", "resumed", resume=folder / "parts")
    return ends


class Interrupted(Instrument):
    """Interrupts gptq after its first segment; only the first process calls it."""

    def __init__(self, first: bool) -> None:
        self._first = first

    def segment(self, program: Program, step: PipelineStep, done: int, total: int) -> None:
        assert self._first
        if (step.current.name, done) == ("gptq", 1):
            raise KeyboardInterrupt


def sharded_training() -> dict[str, Any]:
    """Two steps of a prepared model under FSDP2, each process on its rows; then finished from the gathered state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    def prepared() -> Any:
        return mxcompile.prepare_training(build("llama"), inputs("llama"), "w4a4-mxfp-quick")

    model, ids = prepared(), inputs("llama", 4)["input_ids"]
    number, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if count > 1:
        mesh = dist.device_mesh.init_device_mesh("cpu", (count,))
        for layer in (*model.model.layers, model):
            fully_shard(layer, mesh=mesh)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), list[float]()
    for _ in range(2):
        own = ids[number::count]
        loss = model(input_ids=own, labels=own).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad(), unfused_matmuls():
        logits = model.eval()(input_ids=ids).logits
        fresh = prepared()
        fresh.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        finished = mxcompile.finish_training(fresh)(input_ids=ids).logits
    return {"losses": losses, "logits": logits, "finished": finished}


def main(scenario: str, folder: Path, count: int, number: int) -> None:
    """What the process of that number does, of so many."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    on_gpus = scenario.endswith("_on_gpus")
    if on_gpus:
        torch.cuda.set_device(number)
    if count > 1:
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        dist.init_process_group(backend, f"file://{folder}/group", rank=number, world_size=count)
    function = globals()[scenario]
    done = function(folder) if inspect.signature(function).parameters.keys() & {"folder"} else function()
    torch.save(done, folder / f"{number}.pt")
    if count > 1 and scenario != "lost":
        dist.destroy_process_group()
