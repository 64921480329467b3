"""Saving over a checkpoint: if the process is killed at any moment, the old or the new one is there, whole."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import build, inputs
from transformers import GenerationConfig

import mxcompile
from mxcompile.checkpoint import Checkpoint, check_destination
from mxcompile.checkpoint.provenance import Provenance
from mxcompile.errors import CheckpointError
from mxcompile.tensor.weight import MXWeight

POINTS = 50
KILLED = '''
"""Saves the new model over a copy of the old one, killed in front of the n-th thing done to the file system."""
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import mxcompile
from mxcompile.checkpoint import shards
from models import build
from transformers import AutoTokenizer

torch.set_num_threads(1)
old, new, work = map(Path, sys.argv[1:4])
model = mxcompile.load(new)
tokenizer = AutoTokenizer.from_pretrained(new)
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.fsync"}


def count_down(left):
    def step(event, arguments):
        nonlocal left
        writes = event != "open" or (str(arguments[0]).startswith(str(work)) and arguments[1] not in ("r", "rb"))
        if event in EVENTS and writes:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(step)
    sync, in_bytes = os.fsync, shards.tensor_bytes
    os.fsync = lambda handle: (step("os.fsync", ()), sync(handle))
    shards.tensor_bytes = lambda tensor: (step("os.fsync", ()), in_bytes(tensor))[1]  # between two tensors of a file


point = 0
while True:
    point += 1
    folder = work / f"{point:03}"
    shutil.copytree(old, folder)
    child = os.fork()
    if child == 0:
        count_down(point)
        mxcompile.save(model, folder, tokenizer=tokenizer, max_shard_size="10KB")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(point - 1, os.WEXITSTATUS(status))
        break
'''


@pytest.fixture(scope="module")
def folders(tmp_path_factory, local_model) -> tuple[Path, Path]:
    """Two checkpoints that differ in recipe, tokenizer, generation config, and number of files."""
    from transformers import AutoTokenizer

    old, new = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    for folder, recipe, size in ((old, "w8a8-mxint-quick", "40KB"), (new, "w4a8-mxint-quick", "10KB")):
        model = mxcompile.quantize_and_compile(build("llama"), inputs("llama"), recipe=recipe, compile=False)
        model.generation_config.max_new_tokens = len(recipe)
        tokenizer.add_tokens([recipe])
        mxcompile.save(model, folder, tokenizer=tokenizer, max_shard_size=size)
    return old, new


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name; in place of weights, their index and config, what these hold."""
    checkpoint = Checkpoint(folder)
    own = {checkpoint.config.index, *checkpoint.index.shards, "config.json"}
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in own}
    for name, tensor in checkpoint.tensors().items():
        for part in tensor.parts if isinstance(tensor, MXWeight) else (tensor,):
            found[name] = found.get(name, b"") + part.numpy().tobytes()
    return found | {"config": str(checkpoint.config.model_config).encode()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a process")
@pytest.mark.slow
def test_killed_at_any_moment(folders, tmp_path, monkeypatch):
    old, new = folders
    wanted = [contents(old), contents(new)]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", KILLED, old, new, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    points, status = map(int, done.stdout.split())
    assert status == 0
    assert points >= POINTS
    found: list[int] = []
    for folder in sorted(tmp_path.iterdir()):
        given = contents(folder)
        found += [which for which, files in enumerate(wanted) if files.items() <= given.items()]
    assert len(found) == points + 1
    assert found == sorted(found)
    assert set(found) == {0, 1}


def test_nothing_of_the_old_one_is_left(folders, tmp_path):
    """In turn under two names, so that no file is written over; a save into the folder it was loaded from too."""
    old, new = folders
    for folder in (old, new, old):
        mxcompile.save(mxcompile.load(folder), tmp_path)
        assert contents(tmp_path).items() <= contents(folder).items()
        mxcompile.save(mxcompile.load(tmp_path), tmp_path)
        assert contents(tmp_path).items() <= contents(folder).items()
        stem = Checkpoint(tmp_path).config.index.partition(".")[0]
        weights = {f"{stem}.safetensors.index.json", f"{stem}-00001-of-00001.safetensors"}
        assert names(tmp_path) == {"config.json", "generation_config.json", *weights}


def test_a_model_in_use_is_not_disturbed(folders, tmp_path):
    old, new = folders
    mxcompile.save(mxcompile.load(old), tmp_path)
    used = mxcompile.load(tmp_path)
    before = used(**inputs("llama")).logits
    for _ in range(2):
        mxcompile.save(mxcompile.load(new), tmp_path)
    assert torch.equal(used(**inputs("llama")).logits, before)


def test_other_files_are_left_alone(folders, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    mxcompile.save(mxcompile.load(folders[0]), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{}"),
        ("config.json", '{"quantization_config": {"quant_method": "gptq"}}'),
        ("config.json", "not JSON"),
        ("model.safetensors", ""),
        ("pytorch_model-00001-of-00002.bin", ""),
    ],
)
def test_another_model_s_folder_is_refused(folders, tmp_path, file, text):
    (tmp_path / file).write_text(text)
    with pytest.raises(
        CheckpointError, match=rf"holds files of another model \({file}\): name a new folder, or delete that one"
    ):
        mxcompile.save(mxcompile.load(folders[0]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == text


@pytest.mark.parametrize("leftover", [".mxcompile-save", ".mxcompile-save/config.json"])
def test_another_model_is_safe_where_a_save_was_killed(folders, tmp_path, leftover):
    """What a killed save has staged, even a config, does not make other files ours."""
    stage = tmp_path / ".mxcompile-save"
    stage.mkdir()
    if leftover.endswith("json"):
        (stage / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
    (tmp_path / "model-00001-of-00001.safetensors").write_text("months of training")
    with pytest.raises(CheckpointError, match=r"another model \(model-00001-of-00001\.safetensors\)"):
        mxcompile.save(mxcompile.load(folders[0]), tmp_path)
    assert (tmp_path / "model-00001-of-00001.safetensors").read_text() == "months of training"


def test_weights_that_no_checkpoint_of_ours_names_are_kept(folders, tmp_path):
    mxcompile.save(mxcompile.load(folders[0]), tmp_path)
    (tmp_path / "model.safetensors").write_text("theirs")
    mxcompile.save(mxcompile.load(folders[1]), tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "theirs"


def test_savers_and_readers_of_one_folder(folders, tmp_path):
    """Every save succeeds, every load gets one of the two models, and the last save is whole."""
    models = [mxcompile.load(folder) for folder in folders]
    wanted = [contents(folder) for folder in folders]
    mxcompile.save(models[0], tmp_path)

    def work(n: int) -> bool:
        if n % 3:
            mxcompile.save(models[n % 2], tmp_path, max_shard_size="30KB")
            return True
        return recipe(mxcompile.load(tmp_path)) in map(recipe, models)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))
    weights = contents(tmp_path).items()
    assert any({name: files[name] for name in dict(weights)}.items() == weights for files in wanted)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


@pytest.fixture
def two_models(folders, tmp_path):
    """Of which the folder holds the first; their generation configs differ too."""
    models = [mxcompile.load(folder) for folder in folders]
    for model, length in zip(models, (7, 8), strict=True):
        model.generation_config.max_length = length
    mxcompile.save(models[0], tmp_path)
    return models


@pytest.mark.parametrize("last", [0, 1])
def test_saves_during_a_load_are_no_changes_of_files(two_models, tmp_path, monkeypatch, last):
    """Neither an error nor a warning, also when the last save is of the model which was there before."""
    check = Checkpoint._warn_of_changes

    def saved_over(checkpoint):
        monkeypatch.undo()
        mxcompile.save(two_models[1], tmp_path)
        try:
            check(checkpoint)
        finally:
            mxcompile.save(two_models[last], tmp_path)

    monkeypatch.setattr(Checkpoint, "_warn_of_changes", saved_over)
    assert_same(mxcompile.load(tmp_path), two_models[last])


def test_the_generation_config_is_that_of_the_weights(two_models, tmp_path, monkeypatch):
    """A save that replaces it after the weights have been read: both are read again."""
    read = GenerationConfig.from_pretrained

    def saved_over(*args, **kwargs):
        monkeypatch.undo()
        mxcompile.save(two_models[1], tmp_path)
        return read(*args, **kwargs)

    monkeypatch.setattr(GenerationConfig, "from_pretrained", saved_over)
    assert_same(mxcompile.load(tmp_path), two_models[1])


def assert_same(loaded, saved) -> None:
    assert recipe(loaded) == recipe(saved)
    assert loaded.generation_config.max_length == saved.generation_config.max_length


def recipe(model) -> str:
    return Provenance.of(model).recipe


def test_a_save_that_is_committed_does_not_claim_the_old_one(folders, tmp_path, monkeypatch):
    old, new = folders
    mxcompile.save(mxcompile.load(old), tmp_path)
    model, unlink = mxcompile.load(new), Path.unlink

    def refuse(path, **options):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(CheckpointError, match="holds the new checkpoint, but not all that belongs to it"):
            mxcompile.save(model, tmp_path)
    assert recipe(mxcompile.load(tmp_path)) == recipe(model)
    mxcompile.save(model, tmp_path)
    assert len([name for name in names(tmp_path) if name.endswith(".safetensors")]) == 1


@pytest.mark.parametrize("form", ["mxcompile", "compressed-tensors", "gguf"])
def test_a_place_that_cannot_be_written_is_an_error_before(folders, tmp_path, form):
    """For `save`, and for who asks before the work."""
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "a", Path("/proc/a")):
        with pytest.raises(CheckpointError, match=f"{place} cannot be written"):
            check_destination(place, form)
        with pytest.raises(CheckpointError, match=f"{place} cannot be written"):
            mxcompile.save(mxcompile.load(folders[0]), place, format=form)
    assert names(tmp_path) == {"file"}


def test_a_link_to_a_folder_is_a_folder(folders, tmp_path):
    """Also one to a folder that is not there yet."""
    model = mxcompile.load(folders[0])
    (tmp_path / "there").mkdir()
    for name in ("there", "missing"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / name)
        for _ in range(2):
            mxcompile.save(model, link)
        assert link.is_symlink()
        assert contents(tmp_path / name).items() <= contents(folders[0]).items()


def test_a_damaged_checkpoint_can_be_saved_over(folders, tmp_path):
    old, new = folders
    mxcompile.save(mxcompile.load(old), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("")
    mxcompile.save(mxcompile.load(new), tmp_path)
    assert contents(tmp_path).items() <= contents(new).items()


def test_a_file_is_no_folder(folders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file: name a folder"):
        mxcompile.save(mxcompile.load(folders[0]), tmp_path / "file")


class TokenizerOnAFullDisk:
    """Raises what the library tokenizers does."""

    def save_pretrained(self, to):
        raise Exception("No space left on device (os error 28)")


def test_a_tokenizer_on_a_full_disk_is_explained(folders, tmp_path):
    model = mxcompile.load(folders[0])
    with pytest.raises(CheckpointError, match=r"new cannot be written \(No space left .*: nothing is saved"):
        mxcompile.save(model, tmp_path / "new", tokenizer=TokenizerOnAFullDisk())
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_explained_and_leaves_the_old_one(folders, tmp_path, monkeypatch):
    old, new = folders
    mxcompile.save(mxcompile.load(old), tmp_path)
    model, before = mxcompile.load(new), names(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left .* before it is unchanged"):
            mxcompile.save(model, tmp_path)
        with pytest.raises(CheckpointError, match=r"No space left"):
            mxcompile.save(model, tmp_path / "new")
    assert names(tmp_path) == before
    assert contents(tmp_path).items() <= contents(old).items()
    mxcompile.save(model, tmp_path)
    assert contents(tmp_path).items() <= contents(new).items()
