"""`mxcompile quantize FOLDER --low-memory`: a model that may be larger than memory, calibrated, from files to files."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxcompile.api import quantize_checkpoint
from mxcompile.calibration.ranks.process_group import is_first, launched_group
from mxcompile.checkpoint.hub import find_folder
from mxcompile.cli.compare import EvalOptions, data_without_model
from mxcompile.cli.console import messages, print_json, quoted, results
from mxcompile.cli.interruption import check_apart, interruption_explained
from mxcompile.cli.model_source import load_tokenizer
from mxcompile.cli.progress import Progress
from mxcompile.errors import InputError
from mxcompile.passes.recipes import as_pipeline

_GB = 10**9


@dataclass(frozen=True)
class LowMemoryOptions:
    """Options of the command. resume: None: a folder beside `out`, deleted once that is written. scratch: see
    `quantize_checkpoint`. memory: GB of weights, and GB of calibration states, that may stay in memory. dump: a folder.
    """

    out: Path
    resume: Path | None
    scratch: Path | None
    memory: float
    dump: Path | None = None

    @property
    def resume_folder(self) -> Path:
        """The folder of finished parts."""
        return self.out.with_name(f"{self.out.name}.resume") if self.resume is None else self.resume


def quantize_low_memory(options: EvalOptions, recipe: str, low: LowMemoryOptions, as_json: bool) -> None:
    """Run the command, in each of the processes that torchrun has started; the first one prints and writes.

    Raises InputError for a source that is not in safetensors or has no tokenizer.
    """
    source, console, resume = options.model, messages(), low.resume_folder
    if source is None or source.lower() == "smollm2":
        raise InputError("--low-memory reads a folder with safetensors, or a hub id: name one")
    check_apart(low.out, resume=resume)
    tokenizer = _tokenizer(find_folder(source))
    data = data_without_model(options, tokenizer)
    console.print(f"quantizing in files: {as_pipeline(recipe)}; finished parts go to {resume}", markup=False)
    with (
        interruption_explained(console, resume),
        launched_group(options.device) as device,
        Progress(console) as progress,
    ):
        quantize_checkpoint(
            source,
            data.example(),
            low.out,
            recipe=recipe,
            calibration=data.batches,
            device=device,
            weights_in_memory=int(low.memory * _GB),
            states_in_memory=int(low.memory * _GB),
            scratch=low.scratch,
            dump=low.dump,
            instruments=[progress],
            resume=resume,
            tokenizer=tokenizer,
        )
    if not is_first():
        return
    if low.resume is None:
        shutil.rmtree(resume)
    if as_json:
        print_json({"model": source, "recipe": recipe, "calibration": data.calibration, "out": str(low.out)})
    screen = messages() if as_json else results()
    screen.print(
        f"written to {low.out}, not compared with the float model (mxcompile eval {quoted(low.out)} --against "
        f"{quoted(source)})",
        markup=False,
    )


def _tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{folder} holds no tokenizer (tokenizer_config.json): copy the model's tokenizer there")
    return tokenizer
