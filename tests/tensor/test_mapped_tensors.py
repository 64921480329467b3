"""MappedTensors: values lie in files, are in memory while they are used, and are the same to the bit."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mxcompile.errors import InputError
from mxcompile.ops import QUANTIZE
from mxcompile.tensor.mapped_tensors import MappedTensors
from mxcompile.tensor.weight import MXLayout, MXWeight

CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def mapped(folder: Path, *, copies: bool = False, **limits: int) -> MappedTensors:
    """copies: as on a GPU, where a tensor in use is a copy."""
    made = MappedTensors(folder, CPU, **{"smallest": 64, **limits})
    made._copies = copies
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64])
def test_values_are_the_same(tmp_path, dtype):
    tensors, values = mapped(tmp_path), random(3, 5, 7).mul(100).to(dtype)
    kept = tensors.keep(values)
    assert tensors.holds(kept)
    assert not tensors.holds(values)
    assert kept.dtype == dtype
    assert torch.equal(kept, values)
    assert torch.equal(tensors.use(kept), values)
    assert tensors.keep(kept) is kept


def test_strides_are_row_major(tmp_path):
    kept = mapped(tmp_path).keep(random(8, 6).T)
    assert kept.is_contiguous()
    assert torch.equal(kept, random(8, 6).T)


def test_another_view_of_the_same_memory_is_another_tensor(tmp_path):
    tensors = mapped(tmp_path, copies=True)
    kept = tensors.keep(random(8, 8))
    assert torch.equal(tensors.use(kept), random(8, 8))
    assert not tensors.holds(kept.T)
    assert torch.equal(tensors.use(tensors.keep(kept.T)), random(8, 8).T)


def test_a_small_tensor_stays_in_memory(tmp_path):
    tensors = mapped(tmp_path / "made", smallest=1000)
    assert not tensors.holds(tensors.keep(random(9)))
    assert not (tmp_path / "made").exists()


def test_all_parts_of_a_packed_weight_are_fetched(tmp_path):
    """Of a weight whose elements are mapped and whose scales are too small for that."""
    elsewhere = torch.device("meta")
    tensors = MappedTensors(tmp_path, elsewhere, smallest=1000)
    elements, scales = tensors._written(torch.zeros(64, 32, dtype=torch.uint8)), torch.zeros(64, 2, dtype=torch.uint8)
    weight = MXWeight(elements, scales, MXLayout("mxint4", 64), torch.bfloat16)
    assert {part.device for part in tensors.fetch(weight).parts} == {elsewhere}
    assert tensors.fetch(scales).device == elsewhere
    assert {part.device for part in weight.parts} == {torch.device("cpu")}


def test_parameters_and_packed_weights_keep_their_kind(tmp_path):
    tensors = mapped(tmp_path)
    parameter = nn.Parameter(random(8, 8), requires_grad=False)
    assert isinstance(tensors.keep(parameter), nn.Parameter)
    weight = MXWeight(*QUANTIZE(random(8, 64), "mxint4", "floor"), MXLayout("mxint4", 64), torch.bfloat16)
    kept = tensors.keep(weight)
    assert isinstance(kept, MXWeight)
    assert tensors.holds(kept.elements)
    assert kept.layout_ == weight.layout_
    assert torch.equal(tensors.use(kept).dequantize(), weight.dequantize())
    assert tensors.use(kept) is kept


def test_files_have_no_name_and_go_with_their_tensors(tmp_path):
    tensors = mapped(tmp_path)
    kept = tensors.keep(random(64, 64))
    assert not list(tmp_path.iterdir())
    assert len(tensors._mappings) == 1
    view = kept[2:]
    del kept
    assert torch.equal(view, random(64, 64)[2:])
    del view
    assert not tensors._mappings


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a mapping keeps its file open")
def test_mapped_tensors_keep_no_file_open(tmp_path):
    save_file({"weight": random(64, 64)}, tmp_path / "file")
    tensors, before = mapped(tmp_path), open_files()
    kept = [tensors.keep(random(8, 8) + number) for number in range(40)]
    kept += [tensors.map_file(tmp_path / "file", 8, torch.uint8, torch.Size([100])) for _ in range(40)]
    assert open_files() == before
    assert torch.equal(kept[7], random(8, 8) + 7)


def test_memory_holds_what_was_used_last(tmp_path):
    tensors = mapped(tmp_path, copies=True, in_use=600)
    kept = [tensors.keep(random(8, 8) + index) for index in range(3)]  # 256 bytes each
    copies = [tensors.use(value) for value in kept]
    assert tensors.use(kept[2]) is copies[2]
    assert tensors.use(kept[1]) is copies[1]
    assert tensors.use(kept[0]) is not copies[0]  # was released for the third
    assert tensors.use(kept[2]) is not copies[2]  # for the first
    tensors.release()
    assert not tensors._used
    assert all(torch.equal(tensors.use(value), random(8, 8) + index) for index, value in enumerate(kept))


def test_one_tensor_larger_than_the_limit_can_be_used(tmp_path):
    tensors = mapped(tmp_path, copies=True, in_use=10)
    kept = tensors.keep(random(8, 8))
    assert tensors.use(kept) is tensors.use(kept)


def test_a_copy_of_a_tensor_that_is_gone_is_not_that_of_another(tmp_path):
    tensors = mapped(tmp_path, copies=True)
    addresses: set[int] = set()
    for index in range(20):
        kept = tensors.keep(random(64, 64) + index)
        addresses.add(kept.data_ptr())
        assert torch.equal(tensors.use(kept), random(64, 64) + index)
        del kept
    assert len(addresses) < 20  # mappings have come to lie at the same address


def resident(kind: str) -> int:
    """Bytes of that kind of memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux counts the memory of mapped files")
def test_released_pages_are_out_of_memory(tmp_path):
    size = 64 << 20
    tensors = mapped(tmp_path)
    kept = tensors.keep(torch.ones(size, dtype=torch.uint8))
    before = resident("RssFile")
    tensors.use(kept).amax()
    assert resident("RssFile") > before + size // 2
    tensors.release()
    assert resident("RssFile") < before + size // 4
    assert kept.sum() == size  # read without `use`
    assert resident("RssFile") > before + size // 2
    tensors.give_up(kept)
    assert resident("RssFile") < before + size // 4
    assert tensors.use(kept).sum() == size


def test_what_was_just_written_is_the_copy_in_use(tmp_path):
    """On a GPU it is not read back; a view of larger memory, or in another order, is copied there."""
    tensors, value = mapped(tmp_path, copies=True), random(8, 8)
    assert tensors.use(tensors.keep(value)).data_ptr() == value.data_ptr()
    for view in (random(16, 8)[:8], random(8, 8).T):
        copy = tensors.use(tensors.keep(view))
        assert copy.data_ptr() != view.data_ptr()
        assert copy.untyped_storage().nbytes() == 256
        assert copy.is_contiguous()
        assert torch.equal(copy, view)
    assert not mapped(tmp_path)._used
    on_cpu = mapped(tmp_path)
    on_cpu.keep(value)
    assert not on_cpu._used


def test_what_is_put_away_is_not_in_use(tmp_path):
    tensors, value = mapped(tmp_path, copies=True), random(8, 8)
    kept = tensors.keep(value, in_use=False)
    assert not tensors._used
    assert tensors.use(kept).data_ptr() != value.data_ptr()


def test_room_is_made_before_a_tensor_comes_into_use(tmp_path):
    tensors = mapped(tmp_path, copies=True, in_use=600)
    kept = [tensors.keep(random(8, 8) + index, in_use=False) for index in range(3)]  # 256 bytes each
    in_use = list[int]()

    def counted(value: Tensor) -> Tensor:
        in_use.append(len(tensors._used))
        return value.clone()

    tensors._pinned.to_device = counted
    for value in kept:
        tensors.use(value)
    assert in_use == [0, 1, 1]


def test_a_tensor_that_is_gone_needs_no_room(tmp_path):
    tensors = mapped(tmp_path, copies=True, in_use=600)
    one, other = (tensors.keep(random(8, 8) + index) for index in range(2))
    copy = tensors.use(one)
    del other
    third = tensors.keep(random(8, 8) + 2)
    assert tensors.use(one) is copy
    assert len(tensors._used) == 2
    assert torch.equal(tensors.use(third), random(8, 8) + 2)


@pytest.mark.parametrize(("copies", "calls"), [(False, [0.0, 1.0, 2.0, 40.0]), (True, [0.0, 40.0])])
def test_a_gpu_does_not_wait_for_freed_memory_at_every_batch(tmp_path, monkeypatch, copies, calls):
    """Giving it back takes a second here, so that a GPU's next time is 30 s later."""
    now, taken = [0.0], []

    def trim(_):
        taken.append(now[0])
        now[0] += 1

    monkeypatch.setattr("mxcompile.tensor.mapped_tensors.time.monotonic", lambda: now[0])
    monkeypatch.setattr("mxcompile.tensor.mapped_tensors._malloc_trim", lambda: trim)
    tensors = mapped(tmp_path, copies=copies)
    for _ in range(3):
        tensors.return_freed()
    now[0] = 40.0
    tensors.return_freed()
    assert taken == calls


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to return freed memory")
def test_freed_memory_is_returned(tmp_path):
    """Of small tensors between which others live on: as glibc would not return it by itself."""
    tensors = [torch.ones(16_000) for _ in range(2000)]
    kept = tensors[::50]
    held = resident("RssAnon")
    del tensors
    mapped(tmp_path).return_freed()
    assert held - resident("RssAnon") > 80e6
    assert len(kept) == 40


def test_a_tensor_of_a_file(tmp_path):
    values = {"one": random(5, 3), "two": random(7, dtype=torch.bfloat16)}
    save_file(values, tmp_path / "file.safetensors")
    header = int.from_bytes((tmp_path / "file.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "file.safetensors").stat().st_size
    assert size == 8 + header + 60 + 14
    tensors = mapped(tmp_path)
    one = tensors.map_file(tmp_path / "file.safetensors", 8 + header, torch.float32, torch.Size((5, 3)))
    assert torch.equal(one, values["one"])
    one.zero_()
    again = tensors.map_file(tmp_path / "file.safetensors", 8 + header, torch.float32, torch.Size((5, 3)))
    assert torch.equal(again, values["one"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/folder cannot hold the 0 MB of a tensor .*: make room there"):
        mapped(tmp_path / "file" / "folder").keep(random(8, 8))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match=r"cannot hold the 0 MB of a tensor \(.*No space left on device\): make room"):
        mapped(tmp_path).keep(random(8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
