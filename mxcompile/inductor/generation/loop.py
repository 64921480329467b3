"""The decode loop: prompt -> tokens, as transformers' `_sample` makes them.

After the first step two CUDA graphs make a token: the model's decode step, and what comes after it (scores, the choice
of the token, the inputs of the next step). The host starts them without waiting for their results. Sequences that turn
out to have ended lose the surplus tokens, and the cache and the random numbers are taken back to where they would be.
"""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mxcompile.inductor.captured_step import CapturedStep, NotCapturableError, StepInputs
from mxcompile.inductor.decode_step import DecodeStep
from mxcompile.inductor.generation.scores import Scores
from mxcompile.inductor.generation.sequences import Ends, Sequences, append_and_advance, choose
from mxcompile.inductor.generation.verdicts import Reports, Verdicts
from mxcompile.inductor.repeated_step import RepeatedStep
from mxcompile.kernels.cpu.cores import alone_if_busy

CACHE_NAMES: Final = ("cache", "past_key_values")
"""What `generate` calls the cache: the first since transformers 5.24."""
_MOST_RECORDINGS: Final = 4
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How the next token is chosen and when the loop ends.

    longest: tokens of a sequence at most, with the prompt. criteria: see `Verdicts`.
    """

    scores: Scores
    is_sampled: bool
    ends: Ends
    longest: int
    criteria: Any
    streamer: Any

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for options that one recording serves."""
        return self.scores.key, self.is_sampled, self.ends.key


class Recording:
    """A captured decode step, and captured after it the choice of the token and the inputs of the next step."""

    def __init__(
        self, captured: CapturedStep, step: StepInputs, options: Options, make_graph: Callable[[], Any]
    ) -> None:
        """step: one that the captured step takes. Raises NotCapturableError."""
        logits, cache = captured.result.logits, step.cache
        room = cache.layers[0].max_cache_len + 1
        with torch.inference_mode(False), torch.no_grad():
            self.sequences = _sequences(logits, room, options)
        self._step, self._graph = captured.graph, make_graph()
        run = follow(self.sequences, captured.inputs, _cache_length(cache), options)
        with _kept_random_state(logits.device):
            run(logits)  # what is left to initialize is not captured
            try:
                self._graph.capture(lambda: run(logits))
            except RuntimeError as error:
                raise NotCapturableError(str(error)) from error

    def __call__(self) -> None:
        """Start a step."""
        self._step.replay()
        self._graph.replay()


class Repeated:
    """A decode step that is not captured, and after it the choice of the token and the inputs of the next step."""

    def __init__(self, call: Callable[[], Tensor], inputs: dict[str, Any], logits: Tensor, options: Options) -> None:
        """call: the model with `inputs`; returns its logits. logits: any of the model's, [batch, vocabulary]."""
        self.sequences = _sequences(logits, options.longest, options)
        self._call = call
        cache = next(inputs[name] for name in CACHE_NAMES if name in inputs)
        self._run = follow(self.sequences, inputs, _cache_length(cache), options)
        self._on_cores = alone_if_busy if logits.device.type == "cpu" else nullcontext

    def __call__(self) -> None:
        """Run a step."""
        logits = self._call()
        with self._on_cores():
            self._run(logits)


def decode(
    module: Any, input_ids: Tensor, processors: Any, config: Any, options: Options, model_kwargs: dict[str, Any]
) -> Any:
    """What `_sample` of transformers returns: the prompt and the tokens after it, [batch, n], alone or in its output.

    module, input_ids, processors, config, model_kwargs: as `generate` prepares them.
    """
    outputs = module._prefill(input_ids, config, model_kwargs, is_first_iteration=True)
    with module._optimize_model_for_decode():
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        token, is_valid = choose(processors(input_ids, logits), options.is_sampled)
        tokens = torch.cat([input_ids, token[:, None]], -1)
        model_kwargs = module._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
        del outputs
        run = step = told = None
        is_over = False

        def verdicts_of(run: Recording | Repeated | None) -> Verdicts:
            sequences = _sequences(logits, tokens.shape[1], options) if run is None else run.sequences
            sequences.begin(tokens, is_valid, options.ends, options.scores)
            return Verdicts(sequences, options.ends, options.criteria, options.streamer, input_ids.shape[1])

        if tokens.shape[1] < options.longest:
            inputs = module.prepare_inputs_for_generation(tokens, next_sequence_length=1, **model_kwargs)
            inputs["return_dict"] = True
            step = StepInputs.of(inputs)
            if _is_slow_to_start(module, step, options):  # who streams sees the first token before that
                told = verdicts_of(None)
                is_over = told.is_last(told.sequences.report.cpu())
            run = None if is_over else _runner(module, inputs, step, logits, options)
        verdicts = told if told is not None and is_over else verdicts_of(run)
        if told is not None and not is_over:
            verdicts.go_on_from(told)
        with _exact_random_state(logits.device, options.is_sampled) as steps:
            if not is_over:
                steps.started, steps.kept = _run_steps(run, verdicts, options.longest, told is not None)
        if step is not None and steps.started > steps.kept:
            step.roll_back(steps.started - steps.kept)
    if options.streamer is not None:
        options.streamer.end()
    return _output(verdicts.tokens(), model_kwargs, config)


def _run_steps(run: Callable[[], None] | None, verdicts: Verdicts, longest: int, is_told: bool) -> tuple[int, int]:
    """Run steps until all sequences have ended. Returns how many, and how many of them count.

    is_told: whether the verdict on the prompt's token has been asked for.
    """
    reports = Reports(verdicts.sequences.report)
    first = length = verdicts.length + (not is_told)
    while True:
        if not is_told:
            reports.send(verdicts.sequences.report)
        is_told = False
        is_over = length >= longest
        arrived = reports.arrived(0) if is_over else reports.arrived()
        if any(verdicts.is_last(report) for report in arrived) or run is None or is_over:
            return length - first, verdicts.length - first
        run()
        length += 1


def _is_slow_to_start(module: Any, step: StepInputs | None, options: Options) -> bool:
    """Whether someone waits for the first token, and the decode step has yet to be compiled and captured."""
    if options.streamer is None and not options.criteria:
        return False
    decode_step = vars(module).get("_compiled_call")
    return step is not None and isinstance(decode_step, DecodeStep) and not decode_step.is_captured(step)


def _runner(
    module: Any, inputs: dict[str, Any], step: StepInputs | None, logits: Tensor, options: Options
) -> Recording | Repeated:
    """inputs: of the first step. step: the same, sorted, if a step with them can be captured."""
    decode_step = vars(module).get("_compiled_call")
    if step is not None and isinstance(decode_step, DecodeStep):
        captured = decode_step.captured(step)
        if captured is not None and (run := _recording(captured, step, options, decode_step.graph)) is not None:
            captured.set_inputs(step)
            return run
        return Repeated(lambda: decode_step(**inputs).logits, inputs, logits, options)
    can_repeat = module.device.type == "cpu" and module._compiled_call_impl is not None
    if step is not None and can_repeat:
        return Repeated(RepeatedStep(module, step), inputs, logits, options)
    return Repeated(lambda: module(**inputs).logits, inputs, logits, options)


def _recording(
    captured: CapturedStep, step: StepInputs, options: Options, make_graph: Callable[[], Any]
) -> Recording | None:
    """What follows a captured step with these options; None if that cannot be captured."""
    known = captured.followers
    if options.key in known:
        recording = known.pop(options.key)
    else:
        for key in list(known)[: -_MOST_RECORDINGS + 1]:  # the least recently used
            del known[key]
        try:
            recording = Recording(captured, step, options, make_graph)
        except NotCapturableError as error:
            logger.info("the choice of the token is not captured: %s", error)
            recording = None
    known[options.key] = recording
    return recording


def follow(
    state: Sequences, inputs: dict[str, Any], cache_length: Tensor | None, options: Options
) -> Callable[[Tensor], None]:
    """What follows the model in a step, as a function of its logits `[batch, 1, vocabulary]`."""
    scores, is_sampled = options.scores, options.is_sampled

    def run(logits: Tensor) -> None:
        changed = scores(logits[:, -1], state.tokens, state.length, state.is_end, state.minimum)
        append_and_advance(state, inputs, *choose(changed, is_sampled), cache_length)

    return run


def _sequences(logits: Tensor, room: int, options: Options) -> Sequences:
    return Sequences(len(logits), room, logits.shape[-1], options.ends, logits.device)


def _cache_length(cache: Any) -> Tensor | None:
    """How many tokens a static cache holds; None for another cache."""
    length = getattr(cache.layers[0], "cumulative_length", None)
    return length if isinstance(length, Tensor) else None


def _output(tokens: Tensor, model_kwargs: dict[str, Any], config: Any) -> Any:
    if not config.return_dict_in_generate:
        return tokens
    from transformers.generation import GenerateDecoderOnlyOutput  # only for transformers models

    cache = {name: model_kwargs[name] for name in CACHE_NAMES if name in model_kwargs}
    return GenerateDecoderOnlyOutput(sequences=tokens, **cache)  # pyright: ignore[reportArgumentType]


@contextmanager
def _kept_random_state(device: torch.device) -> Generator[None]:
    """Draw random numbers without a trace."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@dataclass
class _Steps:
    started: int = 0
    kept: int = 0


@contextmanager
def _exact_random_state(device: torch.device, is_sampled: bool) -> Generator[_Steps]:
    """Give back the random numbers that the surplus steps have drawn. All steps draw equally many."""
    steps = _Steps()
    if not is_sampled or device.type != "cuda":
        yield steps
        return
    generator = torch.cuda.default_generators[device.index]
    before = generator.get_offset()
    yield steps
    if steps.started:
        generator.set_offset(before + (generator.get_offset() - before) // steps.started * steps.kept)
