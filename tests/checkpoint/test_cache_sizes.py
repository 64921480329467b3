"""Bytes of a token in a cache, in `explain`, `inspect` and by hand."""

import pytest
import torch
from models import build, inputs
from rich.console import Console

import mxcompile
from mxcompile.checkpoint.cache_sizes import cache_line
from mxcompile.checkpoint.reader import Checkpoint
from mxcompile.cli.checkpoint_contents import CheckpointContents
from mxcompile.diagnostics.explain_quantized import cache_lines
from mxcompile.numerics.cache_format import CacheFormat

SMOLLM2 = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}


@pytest.mark.parametrize(
    ("config", "text", "size", "plain"),
    [
        (SMOLLM2, "mxint8", "11,880", "23,040"),
        (SMOLLM2, "key=mxint8,value=mxint4,window=32", "9,000", "23,040"),
        ({**SMOLLM2, "head_dim": 128}, "mxint4", "12,240", "46,080"),
        ({**SMOLLM2, "layer_types": ["full_attention", "sliding_attention"] * 15}, "mxint8", "5,940", "11,520"),
        ({**SMOLLM2, "kv_lora_rank": 8, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}, "mxint8",
         "8,910", "17,280"),
    ],
)  # fmt: skip
def test_bytes_of_a_token(config, text, size, plain):
    cache = CacheFormat.parse(text)
    expected = f"key/value cache: {cache}, {size} bytes a token ({plain} in half precision)"
    assert cache_line(config, cache) == expected


def test_without_heads_the_format_alone_is_stated():
    assert cache_line({"n_embd": 64}, CacheFormat()) == "key/value cache: key=mxint8,value=mxint8"


def test_explain_and_inspect_state_it(tmp_path):
    model = build("llama")
    pipeline = mxcompile.Pipeline.parse("quantize-cache | lower-mx{weight=mxint8}")
    deployed = mxcompile.deploy(pipeline.run(mxcompile.trace(model, inputs("llama"))), model)
    line = "key/value cache: key=mxint8,value=mxint8, 132 bytes a token (128 in half precision)"  # 2 heads of 16 in 32
    assert line in mxcompile.explain(deployed, device=torch.device("cpu")).conclusions()
    mxcompile.save(deployed, tmp_path / "saved")
    console = Console(record=True, width=200)
    CheckpointContents.of_checkpoint(Checkpoint(tmp_path / "saved")).print_to(console)
    assert line in console.export_text()


@pytest.mark.parametrize(
    ("spec", "how"),
    [
        ("quantize-cache", "attention of up to a few tokens reads packed bytes"),
        ("quantize-cache{window=4}", "of one token reads packed bytes, and exact tokens beside them"),
        ("quantize-cache{key=none,value=mxint4}", "no time: keys stay in float"),
    ],
)
def test_explain_states_how_a_gpu_reads_it(spec, how):
    model = build("llama")
    pipeline = mxcompile.Pipeline.parse(f"{spec} | lower-mx{{weight=mxint8}}")
    deployed = mxcompile.deploy(pipeline.run(mxcompile.trace(model, inputs("llama"))), model)
    gpu, cpu = (cache_lines(deployed, torch.device(kind)) for kind in ("cuda", "cpu"))
    assert any(how in line for line in gpu)
    assert not any("decoded before" in line for line in cpu)
