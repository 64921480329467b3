"""CUDA graphs for the CPU: what a decode step captures is run again by each replay."""

from contextlib import contextmanager

from mxcompile.inductor import backend, captured_step
from mxcompile.inductor.compiled_forward import CompiledForward
from mxcompile.inductor.decode_step import DecodeStep


class RecordedCall:
    """In place of `CudaGraph`. `captured` and `replayed` count over all of them."""

    captured = replayed = 0
    lengths = ()

    def capture(self, call):
        RecordedCall.captured += 1
        self.call = call
        before = [length.clone() for length in RecordedCall.lengths]
        self.result = call()
        for length, known in zip(RecordedCall.lengths, before, strict=True):
            length.copy_(known)
        return self.result

    def replay(self):
        RecordedCall.replayed += 1
        if (result := self.call()) is not None:
            self.result.logits.copy_(result.logits)


@contextmanager
def recorded(module, monkeypatch):
    """A decode step of a deployed module, recorded without Inductor, where `generate` on a GPU has it."""
    RecordedCall.captured = RecordedCall.replayed = 0
    plain = captured_step.StepInputs.of

    def of(kwargs):
        step = plain(kwargs)
        RecordedCall.lengths = [layer.cumulative_length for layer in step.cache.layers] if step else ()
        return step

    monkeypatch.setattr(captured_step.StepInputs, "of", staticmethod(of))
    monkeypatch.setattr(backend.InductorBackend, "__call__", lambda self, graph, inputs, **options: graph)
    mx_backend = backend.MXBackend(backend.compile_options())
    step = DecodeStep(CompiledForward(module, mx_backend), CompiledForward(module, mx_backend), RecordedCall)
    module._compiled_call = step
    yield step
    RecordedCall.lengths = ()
