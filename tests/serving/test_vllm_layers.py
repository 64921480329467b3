"""Layers of vLLM with weights of a checkpoint, loaded by vLLM's own loaders: the bits of the module in transformers."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import engines
import pytest
import torch
from safetensors import safe_open
from served import Spec, mx_weight
from torch import Tensor, nn
from torch.nn import functional as F

from mxcompile.checkpoint.interop.element_layouts import to_rows
from mxcompile.errors import CheckpointError
from mxcompile.formats import parse_format
from mxcompile.serving.stored_model import StoredModel

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(engines.why_no_engine), reason=engines.why_no_engine),
    pytest.mark.filterwarnings("default"),  # vLLM's own
]
BLOCK = "model.layers.1"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "gate_proj": (0,), "up_proj": (1,)}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SUM_TOLERANCE = 2**-6  # of the largest output: two rounded to bfloat16 and added


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory) -> Iterator[None]:
    """vLLM's configuration and groups of processes, for this process alone."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    from mxcompile.serving import register

    register()
    before = torch.get_default_dtype()
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        meeting = tmp_path_factory.mktemp("group") / "point"
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1, backend="gloo")
        torch.set_default_dtype(torch.bfloat16)
        yield
    torch.set_default_dtype(before)


def options_now() -> Any:
    from mxcompile.serving import engine_options

    return engine_options.current()


def engine_with(additional: dict[str, Any]) -> Any:
    """A context in which vLLM was started with this `--additional-config`."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config

    return set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"), additional_config=additional))


class Loaded:
    """A checkpoint, whose layers `make` builds as vLLM does and fills with what is stored."""

    def __init__(self, folder: Any, model: nn.Module) -> None:
        from mxcompile.serving.config import MXCompileConfig

        self.model = model.to(DEVICE)
        self.config = MXCompileConfig.from_config({})
        self.config.maybe_update_config(str(folder))
        self.config.packed_modules_mapping.update(FUSED)
        self.file = safe_open(next(folder.glob("*.safetensors")), "pt")

    def make(self, build: Callable[..., Any], path: str, *sizes: Any) -> Any:
        layer = build(*sizes, quant_config=self.config, prefix=path)
        for part in self.config.parts(path):
            for suffix in ("", "_scales", "_multiplier"):
                stored = f"{part}.weight{suffix.replace('_', '.')}"
                if stored in set(self.file.keys()):
                    parameter = getattr(layer, f"weight{suffix}")
                    load = getattr(parameter, "weight_loader", layer.weight_loader)
                    load(parameter, self.file.get_tensor(stored), *SHARDS.get(part.rpartition(".")[2], ()))
        layer.to(DEVICE).quant_method.process_weights_after_loading(layer)
        return layer

    def expected(self, path: str, x: Tensor) -> Tensor:
        parts = [self.model.get_submodule(part) for part in self.config.parts(path)]
        return torch.cat([F.linear(x, part.weight) for part in parts], dim=-1)

    def layers(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

        return {
            f"{BLOCK}.self_attn.qkv_proj": (QKVParallelLinear, (256, 64, 4, 2, False)),
            f"{BLOCK}.self_attn.o_proj": (RowParallelLinear, (256, 256, False)),
            f"{BLOCK}.mlp.gate_up_proj": (MergedColumnParallelLinear, (256, [512, 512], False)),
            f"{BLOCK}.mlp.down_proj": (RowParallelLinear, (512, 256, False)),
        }


@pytest.fixture
def loaded(checkpoint) -> Callable[[str], Loaded]:
    return lambda kind: Loaded(*checkpoint(kind))


def tokens(size: int) -> Tensor:
    values = torch.randn(5, size, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    return values.to(DEVICE, torch.bfloat16)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Whether the bits are equal; a GPU's kernels add in another order for another number of rows."""
    if DEVICE.type == "cpu":
        return torch.equal(actual, expected)
    return bool((actual - expected).abs().max() <= SUM_TOLERANCE * expected.abs().max())


def as_process(rank: int, count: int) -> ExitStack:
    """Let vLLM build layers as in the process `rank` of several."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    patches = ExitStack()
    for module in (linear, parameter):
        for name, value in (("rank", rank), ("world_size", count)):
            patch = mock.patch.object(module, f"get_tensor_model_parallel_{name}", return_value=value)
            patches.enter_context(patch)
    return patches


@pytest.mark.parametrize("kind", ["w4a8", "mixed", "prepared", "tied"])
def test_linear_layers(kind, loaded):
    """In "prepared", layer 1 has its multiplier from the file: layer 0's name is the one under which it is stored."""
    stored = loaded(kind)
    for path, (build, sizes) in stored.layers().items():
        if stored.config.stored.layout(path, stored.config.parts(path)) is not None:
            layer, x = stored.make(build, path, *sizes), tokens(sizes[0])
            assert same(layer.quant_method.apply(layer, x), stored.expected(path, x)), path


@pytest.mark.parametrize("kind", ["w4a8", "prepared"])
def test_column_parallel_layers_in_two_processes(kind, loaded):
    stored = loaded(kind)
    for path, (build, sizes) in list(stored.layers().items())[::2]:
        x, shares = tokens(256), list[tuple[Tensor, ...]]()
        for rank in range(2):
            with as_process(rank, 2):
                layer = stored.make(build, path, *sizes)
            shares.append(layer.quant_method.apply(layer, x).split(layer.output_partition_sizes, dim=-1))
        joined = torch.cat([share for of_part in zip(*shares, strict=True) for share in of_part], dim=-1)
        assert same(joined, stored.expected(path, x)), path


@pytest.mark.parametrize("kind", ["w4a8", "prepared"])
def test_row_parallel_layers_in_two_processes(kind, loaded):
    stored = loaded(kind)
    for path, (build, sizes) in list(stored.layers().items())[1::2]:
        x, shares = tokens(sizes[0]), list[Tensor]()
        for rank, part in enumerate(x.chunk(2, dim=-1)):
            with as_process(rank, 2):
                layer = stored.make(build, path, *sizes)
            shares.append(layer.quant_method.apply(layer, part))
        expected = stored.expected(path, x).float()
        assert (sum(shares).float() - expected).abs().max() <= SUM_TOLERANCE * expected.abs().max(), path


def test_a_share_that_cuts_a_rotation_is_refused(loaded):
    from vllm.model_executor.layers.linear import RowParallelLinear

    path = f"{BLOCK}.self_attn.o_proj"
    message = rf"{path} cannot be divided over 4 processes: its share of 256 inputs, 64, cuts a rotation of 128"
    with as_process(0, 4), pytest.raises(CheckpointError, match=message):
        loaded("prepared").make(RowParallelLinear, path, 256, 256, False)


def test_a_quantized_head_and_a_tied_one(loaded):
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    x, ids = tokens(256), torch.arange(40)
    stored = loaded("w4a16")
    head = stored.make(ParallelLMHead, "lm_head", 512, 256)
    assert torch.equal(head.quant_method.apply(head, x), stored.model.lm_head(x))
    stored = loaded("tied")
    table = VocabParallelEmbedding(512, 256, quant_config=stored.config)  # as vLLM's Llama does, without a prefix
    for name in ("weight", "weight_scales"):
        values = stored.file.get_tensor(f"model.embed_tokens.{name.replace('_', '.')}")
        table.weight_loader(getattr(table, name), values)
    table.quant_method.process_weights_after_loading(table)
    head = ParallelLMHead(512, 256, quant_config=stored.config, prefix="lm_head").tie_weights(table)
    assert torch.equal(table(ids), stored.model.model.embed_tokens(ids))
    assert torch.equal(head.quant_method.apply(head, x), stored.model.lm_head(x))


def test_a_layer_that_was_not_loaded_completely_is_refused(loaded):
    from vllm.model_executor.layers.linear import RowParallelLinear

    stored, path = loaded("w4a8"), f"{BLOCK}.mlp.down_proj"
    layer = RowParallelLinear(512, 256, False, quant_config=stored.config, prefix=path)
    with pytest.raises(CheckpointError, match=rf"{path} was not loaded completely"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(("fmt", "stored_dtype"), [("mxfp4", torch.uint8), ("mxfp8_e4m3", torch.float8_e4m3fn)])
def test_the_kernel_for_layers_of_compressed_tensors(fmt, stored_dtype):
    from mxcompile.serving import stock_kernels

    weight = mx_weight(torch.randn(96, 256), Spec(fmt, None))
    layer = nn.Module()
    layer.weight = nn.Parameter(to_rows(weight, parse_format(fmt)).view(stored_dtype), requires_grad=False)
    layer.weight_scale = nn.Parameter(weight.scales, requires_grad=False)
    kernels = {"mxfp4": "MXCompileMxFp4LinearKernel", "mxfp8_e4m3": "MXCompileMxfp8LinearKernel"}
    kernel = getattr(stock_kernels, kernels[fmt])(None)
    kernel.process_weights_after_loading(layer)
    x, bias = tokens(256), torch.randn(96)
    assert torch.equal(kernel.apply_weights(layer, x, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize(("options", "verify"), [({}, True), ({"verify": True}, True), ({"verify": False}, False)])
def test_the_checksums_of_tensors_can_be_left_out(options, verify, checkpoint, tmp_path):
    """A damaged folder is refused before anything is loaded, unless checksums are not wanted."""
    folder = shutil.copytree(checkpoint("w4a8")[0], tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    stored = StoredModel(folder)
    with engine_with({"mxcompile": options}):
        assert options_now().verify == verify
        if verify:
            with pytest.raises(CheckpointError, match="has changed since it was written"):
                options_now().check_once(stored)
        else:
            options_now().check_once(stored)


@pytest.mark.parametrize("options", [{"verfy": False}, {"verify": "no"}, True])
def test_options_that_do_not_exist_are_refused(options):
    with engine_with({"mxcompile": options}), pytest.raises(CheckpointError, match="the only one is"):
        options_now()


def test_a_second_registration_changes_nothing():
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from mxcompile.serving import register

    kernels, methods = str(linear._POSSIBLE_MXFP4_KERNELS), list(QUANTIZATION_METHODS)
    register()
    assert (str(linear._POSSIBLE_MXFP4_KERNELS), QUANTIZATION_METHODS) == (kernels, methods)
    assert methods.count("mxcompile") == 1
    assert get_quantization_config("mxcompile").__name__ == "MXCompileConfig"
