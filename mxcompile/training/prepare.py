"""prepare_training: a float model -> the same class, whose forward rounds as the deployed model will; and back.

    model -> trace, recipe -> prepared: float weights, rounded in each forward -> (any trainer) -> deployed MXWeights

The deployed model and the prepared one run the same operators on the same values, so that their outputs are equal to
the bit in eager mode (`unfused_matmuls`), before training and after it.
"""

from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from mxcompile.arguments import checked
from mxcompile.checkpoint import mark_quantized
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.deploy import placed
from mxcompile.errors import TrainingError, warn
from mxcompile.graph.agreement import agreement_db, compared_outputs, output_tensors
from mxcompile.graph.callers_modes import without_callers_modes
from mxcompile.graph.inputs import Inputs
from mxcompile.graph.program import Program, float_values
from mxcompile.graph.trace import trace
from mxcompile.passes import LowerMX
from mxcompile.passes.recipes import as_pipeline
from mxcompile.pipeline.interfaces import Instrument, PipelineStep
from mxcompile.pipeline.pipeline import Pipeline
from mxcompile.tensor.copying import copy_module
from mxcompile.tensor.weight import MXWeight, unfused_matmuls
from mxcompile.training import rounded_weights

M = TypeVar("M", bound=nn.Module)


@without_callers_modes()
@checked
def prepare_training(
    model: M,
    example_inputs: object,
    recipe: str | Pipeline,
    *,
    calibration: object = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    allow_partial: bool = False,
) -> M:
    """A copy of a float model to train: its forward rounds weights and inputs as the deployed model will.

    Any trainer works on it: its class is that of `model`, its parameters are float, and gradients pass the roundings.
    Training starts from what the passes before `lower-mx` make of the weights: float values that folds changed, or, if
    a pass such as `gptq` rounds them, its result. Norms, biases, embeddings and the output head train where they did in
    `model`; switch them off with `requires_grad_(False)`.

    example_inputs, calibration, include, exclude, allow_partial: as for `quantize_and_compile`. recipe: a name, a
    Pipeline or its text form; it must lower.

    Returns the prepared model, in the mode (train or eval) of `model`; nothing is shared with `model`. Its outputs on
    the example are compared with those of the deployed model, to the bit.
    Raises TrainingError for a model that cannot be trained (compiled, exported, without float outputs) and for a weight
    whose input is rounded inside a module's own forward; other subclasses of MXCompileError as `quantize_and_compile`.
    """
    _check_trainable(model)
    pipeline = as_pipeline(recipe)
    lowering = next((current for current in pipeline.passes if isinstance(current, LowerMX)), None)
    if lowering is None:
        raise TrainingError(
            f"the recipe {pipeline} does not lower: end it with lower-mx, whose formats are trained for"
        )
    program = trace(model, example_inputs, include=include, exclude=exclude, allow_partial=allow_partial)
    start = _FloatWeights()
    program = pipeline.run(program, calibration, [start])
    example = program.example.cloned()
    program(*example.args, **example.kwargs)  # raises InputError where tracing, by shapes alone, did not
    deployed = placed(program, model)
    prepared = _rounding(deployed, start.values, str(lowering.weight_rule))
    _check_outputs(program.example, prepared, deployed)
    for (_, own), (_, other) in zip(model.named_modules(), _modules(prepared, model), strict=True):
        other.training = own.training
    _require_gradients(prepared, model)
    return prepared


@checked
def finish_training(prepared: M) -> M:
    """The deployed model of a prepared one: of the same class, with MXWeight parameters, in eval mode.

    prepared: may be trained further; nothing is shared with it. Compile the result with `compile_module`, save it with
    `save`.
    Raises TrainingError if it is no such model, is wrapped, or has adapters of peft; WeightError for NaN or Inf.
    """
    if hasattr(prepared, "peft_config"):
        raise TrainingError(
            "the model has adapters of peft: finish what merge_and_unload() returns. They are merged without a loss if "
            "they were trained inside the rounding (mxcompile.round_adapters, before training)"
        )
    if hasattr(prepared, "_orig_mod") or isinstance(prepared, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TrainingError(
            f"the model is wrapped in a {type(prepared).__name__}: finish the model inside it "
            "(accelerator.unwrap_model(model), or model.module)"
        )
    weights = rounded_weights.rounded_weights(prepared)
    if not weights:
        raise TrainingError(
            f"this {type(prepared).__name__} has no weight that rounds: give finish_training the model that "
            "prepare_training returned"
        )
    replaced: dict[int, nn.Parameter] = {}
    for full_name, (module, name, step) in weights.items():
        value = rounded_weights.packed(full_name, module, name, step)
        replaced[id(rounded_weights.latent(module, name))] = nn.Parameter(value, requires_grad=False)
    deployed = copy_module(prepared, replaced=replaced)
    for module in {id(owner): owner for owner, _, _ in rounded_weights.rounded_weights(deployed).values()}.values():
        rounded_weights.detach(module)
    mark_quantized(deployed.requires_grad_(False).eval(), Provenance.of(prepared))
    return deployed


class _FloatWeights(Instrument):
    """The weights before the first `lower-mx`, by all their names.

    They are the program's own tensors, which passes replace and never write to.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def before(self, program: Program, step: PipelineStep) -> None:
        if isinstance(step.current, LowerMX) and not self.values:
            for name in program.parameter_names():
                value = program.stored(name)
                self.values.update(dict.fromkeys(program.aliases.get(name, (name,)), value))


def _check_trainable(model: nn.Module) -> None:
    kind = type(model).__name__
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:  # pyright: ignore[reportPrivateUsage]
        raise TrainingError(
            f"this {kind} is compiled: prepare the float model itself, and compile what prepare_training returns"
        )
    if isinstance(model, torch.fx.GraphModule):
        raise TrainingError(
            f"this {kind} is a graph, as torch.export makes them, and no class of yours that a trainer could run: "
            "prepare the module that was exported"
        )
    if any(isinstance(value, MXWeight) for value in model.parameters()):
        raise TrainingError(
            f"this {kind} is quantized already: prepare the float model that it was made from, or train adapters on it "
            "(peft.get_peft_model)"
        )


def _rounding(deployed: M, start: dict[str, Tensor], rule: str) -> M:
    """A copy of the deployed model whose MX weights are float parameters that round."""
    weights = {
        name: value for name, value in deployed.named_parameters(remove_duplicate=False) if isinstance(value, MXWeight)
    }
    replaced: dict[int, nn.Parameter] = {}
    for name, value in weights.items():
        _check_weight(deployed, name, value)
        if id(value) in replaced:
            raise TrainingError(
                f"{name!r} is the same parameter as another that is quantized, and both would have to train as one: "
                "exclude them, or untie them in the model"
            )
        replaced[id(value)] = nn.Parameter(_starting_values(name, value, start, rule))
    prepared = copy_module(deployed, replaced=replaced)
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        rounded_weights.attach(prepared.get_submodule(path), leaf, value, rule)
    return prepared


def _check_weight(deployed: nn.Module, name: str, weight: MXWeight) -> None:
    from transformers.pytorch_utils import Conv1D  # transformers is slow to import

    path, _, leaf = name.rpartition(".")
    owner = deployed.get_submodule(path)
    if rounded_weights.prepares_input(weight) and not (isinstance(owner, nn.Linear | Conv1D) and leaf == "weight"):
        raise TrainingError(
            f"{name!r} is multiplied inside the forward of {type(owner).__name__}, where no hook can round its input: "
            f"leave it in float (exclude={[name]}), or use a recipe that rounds weights only, such as w4a16-mxfp"
        )


def _starting_values(name: str, weight: MXWeight, start: dict[str, Tensor], rule: str) -> Tensor:
    """Float values that round to those of the deployed weight: of before it was lowered, else the weight's own."""
    expected = weight.dequantize()
    step = rounded_weights.RoundedWeight(weight.layout_, rule)
    candidates = [float_values(start[name])] if name in start else []
    for value in (*candidates, expected):
        if value.shape == weight.shape and torch.equal(step(value.detach()), expected):
            return value.detach().clone(memory_format=torch.contiguous_format)
    raise TrainingError(
        f"{name!r} does not keep its values under the scale rule {rule!r}, by which it would be rounded in training: "
        "use weight_rule=mse in lower-mx"
    )


def _check_outputs(example: Inputs, prepared: nn.Module, deployed: nn.Module) -> None:
    """Raise TrainingError unless both give the same outputs on the example, to the bit, and a float one."""
    twin = copy_module(prepared, (*prepared.parameters(),))
    with torch.no_grad(), unfused_matmuls():
        one, other = example.cloned(), example.cloned()
        expected, actual = deployed(*one.args, **one.kwargs), twin(*other.args, **other.kwargs)
    if not output_tensors(expected):
        raise TrainingError(
            f"no output of {type(deployed).__name__} is a float tensor, so that no loss has a gradient: prepare the "
            "module inside it that returns logits"
        )
    wanted, got = compared_outputs(expected), compared_outputs(actual)
    different = [name for name, value in wanted.items() if name not in got or not torch.equal(value, got[name])]
    if different:
        agreement, _ = agreement_db(wanted, got)
        raise TrainingError(
            f"output {different[0] or '0'} of the prepared model is not that of the deployed one to the bit "
            f"({agreement:.1f} dB): the model is not deterministic in eval mode, or multiplies a quantized weight in a "
            "way that training cannot follow; exclude that weight"
        )


def _modules(prepared: nn.Module, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the prepared model that `model` has too, in its order."""
    return [(path, prepared.get_submodule(path)) for path, _ in model.named_modules()]


def _require_gradients(prepared: nn.Module, model: nn.Module) -> None:
    """Each parameter trains where it did in the model; warns of those that are too coarse to train."""
    rounding = rounded_weights.rounded_weights(prepared)
    others = dict(prepared.named_parameters(remove_duplicate=False))
    for name, own in model.named_parameters(remove_duplicate=False):
        value = others.get(name)
        if name in rounding:
            module, leaf, _ = rounding[name]
            value = rounded_weights.latent(module, leaf)
        if value is not None:
            cast(Tensor, value).requires_grad_(own.requires_grad)
    coarse = {parameter.dtype for parameter in prepared.parameters() if parameter.requires_grad} - {torch.float32}
    coarse = {dtype for dtype in coarse if dtype.itemsize < 4}
    if coarse:
        warn(
            f"trained parameters are in {', '.join(sorted(map(str, coarse)))}, in which small steps are lost: load the "
            "model in float32, and let the trainer compute in bfloat16 (autocast, bf16=True)"
        )
