"""Which files of a vLLM wheel are carried to a machine with a GPU."""

import tarfile
from zipfile import ZipFile

import pytest
import vllm_parts
from vllm_parts import PARTS, choose

KERNELS = "vllm/_C_stable_libtorch.abi3.so"
ATTENTION = ["vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", "vllm/spinloop.abi3.so"]
PYTHON = ["vllm/__init__.py", "vllm/model_executor/layers/fused_moe/configs/E=8.json", "vllm-0.26.0.dist-info/METADATA"]
LEFT_OUT = [
    *("vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so", "vllm/vllm-rs"),
    "vllm/third_party/deep_gemm/_C.cpython-312-x86_64-linux-gnu.so",
    *("vllm/_flashmla_C.abi3.so", "vllm/_qutlass_C.abi3.so", "vllm/third_party/x/include/cute/layout.hpp"),
]
ALL = [KERNELS, *ATTENTION, *PYTHON, *LEFT_OUT]


def test_parts_and_what_is_left_out():
    assert choose(ALL, PARTS) == {"kernels": [KERNELS], "attention": ATTENTION, "python": PYTHON}


def test_another_release_is_refused():
    with pytest.raises(SystemExit, match="the wheel has no files for attention: "):
        choose([KERNELS, *PYTHON], PARTS)


def test_archives_hold_the_files_and_are_the_same_each_time(tmp_path, capsys):
    wheel = tmp_path / "vllm.whl"
    with ZipFile(wheel, "w") as file:
        for name in ALL:
            file.writestr(name, name * 10)
    for folder in ("one", "two"):
        assert vllm_parts.main([str(wheel), str(tmp_path / folder), "--moe"]) == 0
    assert "experts.tar.xz: 1 files" in capsys.readouterr().out
    paths = sorted((tmp_path / "one").iterdir())
    assert [path.name for path in paths] == [f"{p}.tar.xz" for p in ("attention", "experts", "kernels", "python")]
    assert all(path.read_bytes() == (tmp_path / "two" / path.name).read_bytes() for path in paths)
    with tarfile.open(paths[2]) as archive:
        assert archive.extractfile(KERNELS).read() == (KERNELS * 10).encode()
