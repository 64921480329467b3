"""The report page: its texts and data, that it is self-contained, and that names from a model are escaped."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from models import MODELS, build, inputs, llama
from reports import HOSTILE, ROUND, TEXT, Hostile, dump, fail
from typer.testing import CliRunner

import mxcompile
from mxcompile import Measure, Miss, PassResult, Pipeline
from mxcompile.cli.app import app
from mxcompile.diagnostics.dump import Dump, write_page
from mxcompile.diagnostics.dump_reader import DumpReader
from mxcompile.diagnostics.report.content import cell, owner
from mxcompile.diagnostics.report.nodes import GraphNode, read_graph
from mxcompile.errors import DumpError, PassError
from mxcompile.graph.printer import print_program, print_type
from mxcompile.graph.program import module_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dump")
    dump(path, llama(2), inputs("llama"))
    return path


class Page(HTMLParser):
    """Texts, tags and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def content(self):
        return json.loads(self.scripts[0])


def page(folder) -> Page:
    return Page((folder / "index.html").read_text())


# What it says


def test_the_overview(folder):
    text = page(folder).text
    last = DumpReader(folder).ledger().passes[-1]
    assert "smooth-quant round-weights{format=mxint4} lower-mx{weight=mxint4,activation=mxint8} Size" in text
    assert f"Output SQNR {last.measured.output_db:.1f} dB" in text
    assert f"KL divergence {last.measured.kl:.4f}" in text
    assert f"Top-1 agreement {last.measured.top1:.1%}" in text
    assert "Layers 14 14 in mxint4 on mxint8" in text
    assert (
        "%linear_14 in lm_head the output head stays float; ask for it with include=['lm_head'] round-weights" in text
    )


def test_the_content_is_all_of_the_dump(folder):
    content, reader = page(folder).content, DumpReader(folder)
    ledger = reader.ledger()
    assert [stage["name"] for stage in content["stages"]] == reader.stages()
    for stage in content["stages"]:
        assert len(stage["nodes"]) == len(reader.text(stage["name"]).splitlines())
    for found, record in zip(content["passes"], ledger.passes, strict=True):
        assert found["spec"] == record.spec
        assert found["numbers"].keys() == found["distributions"].keys() == record.measured.layers.keys()
    assert content["passes"][-1]["diff"].startswith("--- before\n+++ 03-lower-mx\n@@ ")
    assert [layer["name"] for layer in content["layers"]] == list(ledger.layers())
    assert content["layers"][7] == {
        "name": "model.layers.1.self_attn.q_proj.weight",
        "module": "model.layers.1.self_attn.q_proj",
        "row": "model.layers.1",
        "column": "self_attn.q_proj",
    }


def test_cached_keys_and_values_are_cells_behind_the_layers(tmp_path):
    """Of each attention, with the numbers of the pass that rounded them, in that pass and all after it."""
    dump(tmp_path, llama(2), inputs("llama"), "smooth-quant", "quantize-cache{key=none,value=mxint4}", ROUND)
    content, ledger = page(tmp_path).content, DumpReader(tmp_path).ledger()
    names = [f"model.layers.{index}.self_attn.cached_values" for index in range(2)]
    assert [layer["name"] for layer in content["layers"]] == [*ledger.layers(), *names]
    assert content["layers"][-1] == {
        "name": names[1],
        "module": "model.layers.1.self_attn",
        "row": "model.layers.1",
        "column": "self_attn.cached_values",
    }
    assert names[0] not in content["passes"][0]["numbers"]
    db = ledger.passes[1].numbers["model.layers.1.self_attn"]["value_sqnr_db"]
    for record in content["passes"][1:]:
        assert record["numbers"][names[1]] == {
            "cache": "quantize-cache{key=none,value=mxint4}",
            "weight_db": None,
            "local_db": db,
            "accumulated_db": None,
        }


@pytest.mark.parametrize(
    ("layer", "module", "row", "column"),
    [
        ("layers.3.mlp.experts.gate_up_proj", "layers.3.mlp.experts", "layers.3", "mlp.experts.gate_up_proj"),
        ("h.11.attn.c_attn.weight (2)", "h.11.attn.c_attn", "h.11", "attn.c_attn (2)"),
        ("decoder.block.0.layer.1.wi.weight", "decoder.block.0.layer.1.wi", "decoder.block.0", "layer.1.wi"),
        ("model.lm_head.weight", "model.lm_head", "model", "lm_head"),
        ("up.weight", "up", "", "up"),
        ("0.weight", "0", "", "0"),
        ("weight", "", "", "weight"),
    ],
)
def test_where_a_layer_is(layer, module, row, column):
    assert (owner(layer), *cell(layer)) == (module, row, column)


@pytest.mark.parametrize("name", MODELS)
def test_nodes_are_read_back(traced, name):
    """Name, dtype, shape and module of every node, of every model, in float, lowered and fused."""
    for text in ("smooth-quant", f"{TEXT} | fuse-mx-gemm"):
        program = Pipeline.parse(text).run(traced(name))
        nodes = read_graph(print_program(program))
        symbols: dict[str, str] = {}
        for node, read in zip(program.graph.nodes, nodes, strict=True):
            if node.op in ("output", "call_module"):
                continue
            kind = print_type(node.meta.get("val"), symbols)
            module = str(node.target).rpartition(".")[0] if node.op == "get_attr" else module_path(node)
            types = re.findall(r"(\w+)(\[[^\]]*\])", kind)
            assert read.name == node.name
            assert read.module == module
            assert read.dtype == (", ".join(dict.fromkeys(dtype for dtype, _ in types)) or kind)
            assert read.shape == "  ".join(shape for _, shape in types)
            assert read.op in ("input", "tensor") or read.op.partition(".")[0] in str(node.target)


def test_formats_of_nodes(traced):
    program = Pipeline.parse(TEXT).run(traced("mlp"))
    formats = {node.name: node.format for node in read_graph(print_program(program))}
    assert {name: fmt for name, fmt in formats.items() if fmt and name.startswith("up")} == {
        "up_weight_elements": "mxint4",
        "up_weight_scales": "mxint4",
        "up_weight_dequantized": "mxint4",
    }
    assert {name: fmt for name, fmt in formats.items() if fmt and name.startswith("layer_norm")} == {
        "layer_norm_quantized": "mxint8",
        "layer_norm_elements": "mxint8",
        "layer_norm_scales": "mxint8",
        "layer_norm_dequantized": "mxint8",
    }
    rounded = Pipeline.parse(ROUND).run(traced("mlp"))
    (weight,) = (node for node in read_graph(print_program(rounded)) if node.name == "up_weight")
    assert weight == GraphNode("up_weight", "tensor", weight.call, "f32", "[128, 64]", "mxint4", "up")


def test_lines_that_are_no_nodes_are_kept():
    assert read_graph('%a  f32[2] = tensor "x\ny.weight" sha=1\n') == [
        GraphNode("a", 'tensor "x', "", "f32", "[2]"),
        GraphNode("", "", 'y.weight" sha=1'),
    ]


# Runs that are not whole


def test_a_failed_pass_is_shown_with_the_graph_before_it(tmp_path):
    with pytest.raises(PassError):
        dump(tmp_path, build("mlp"), inputs("mlp"), ROUND, fail, "lower-mx{weight=mxint4}")
    found = page(tmp_path)
    assert "Pass 2 of 3 failed pass 'own' failed: ValueError: no fuel in <img src=x onerror=alert(1)>" in found.text
    assert "Still to run: lower-mx{weight=mxint4}" in found.text
    assert [stage["name"] for stage in found.content["stages"]] == ["00-trace", "01-round-weights"]
    assert "up.weight" in found.content["passes"][0]["numbers"]
    assert "img" not in {tag for tag, _ in found.tags}


def test_the_first_pass_fails(tmp_path):
    dump(tmp_path, build("mlp"), inputs("mlp"), ROUND)
    with pytest.raises(PassError):
        dump(tmp_path, build("mlp"), inputs("mlp"), fail)
    found = page(tmp_path)
    assert "Pass 1 of 1 failed" in found.text
    assert "No heat map and no histograms: no pass has finished." in found.text
    assert found.content["passes"] == []


def test_an_interrupted_run_says_so_when_the_page_is_written_again(tmp_path):
    def interrupt(program):
        raise KeyboardInterrupt

    dump(tmp_path, build("mlp"), inputs("mlp"))
    with pytest.raises(KeyboardInterrupt):
        dump(tmp_path, build("mlp"), inputs("mlp"), ROUND, interrupt)
    assert not (tmp_path / "index.html").exists()
    write_page(tmp_path)
    assert "The run stopped after 1 of 2 passes" in page(tmp_path).text


def test_a_run_that_was_not_measured_says_what_is_not_there(tmp_path):
    mxcompile.quantize_and_compile(build("mlp"), inputs("mlp"), recipe=TEXT, dump=tmp_path, probe=False, compile=False)
    found = page(tmp_path)
    assert "No heat map and no histograms: the layers were not measured. The run had no probe" in found.text
    assert "Output SQNR 1" not in found.text
    assert found.content["layers"] == []
    assert len(found.content["stages"]) == 4


def test_a_cache_that_was_not_measured_has_no_cells(tmp_path):
    Pipeline.parse("quantize-cache").run(mxcompile.trace(llama(2), inputs("llama")), instruments=[Dump(tmp_path)])
    found = page(tmp_path)
    assert found.content["passes"][0]["numbers"] == {}
    assert found.content["layers"] == []


def test_a_pipeline_without_passes(tmp_path):
    Pipeline([]).run(mxcompile.trace(build("mlp"), inputs("mlp")), instruments=[Dump(tmp_path), Measure()])
    assert "no pass has run" in page(tmp_path).text


# One file, the same each time


def test_it_is_written_again_as_it_was(folder):
    before = (folder / "index.html").read_bytes()
    (folder / "index.html").unlink()
    result = CliRunner().invoke(app, ["show", str(folder), "--html"])
    assert result.output.replace("\n", "") == str(folder / "index.html")
    assert (folder / "index.html").read_bytes() == before


def test_a_dump_without_distributions_is_refused(tmp_path):
    dump(tmp_path, build("mlp"), inputs("mlp"))
    before = (tmp_path / "index.html").read_bytes()
    (tmp_path / "distributions.json").unlink()
    with pytest.raises(DumpError, match="distributions"):
        write_page(tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before


def test_two_runs_differ_in_seconds_only(tmp_path):
    texts = []
    for name in "ab":
        dump(tmp_path / name, build("mlp"), inputs("mlp"))
        text = (tmp_path / name / "index.html").read_text()
        assert str(tmp_path) not in text
        texts.append(re.sub(r"\d+\.\d\d( s)?<", "<", text))
    assert texts[0] == texts[1]


def test_it_needs_nothing_else(folder):
    """No tag names another file, and the policy allows no request and no script but those in the page."""
    found = page(folder)
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    (policy,) = (a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found.scripts[1:]]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    assert len(digests) == 2


def test_a_model_of_32_layers_stays_small(tmp_path):
    """Of 224 matmuls after 4 passes, by what a layer adds; names are as long as those of a large model."""
    sizes = {}
    for layers in (2, 4):
        dump(tmp_path / str(layers), llama(layers), inputs("llama"), f"{TEXT} | fuse-mx-gemm")
        assert len(page(tmp_path / str(layers)).content["layers"]) == 7 * layers
        sizes[layers] = (tmp_path / str(layers) / "index.html").stat().st_size
    assert sizes[2] + 15 * (sizes[4] - sizes[2]) < 5e6


# Names are text


def test_names_and_misses_are_text(tmp_path):
    miss = PassResult(0, (Miss(HOSTILE[0], HOSTILE[1], 4608),))
    dump(tmp_path, Hostile(), torch.randn(4, 64), lambda program: miss, TEXT)
    found = page(tmp_path)
    assert [layer["module"] for layer in found.content["layers"]] == list(HOSTILE)
    assert {node[-1] for node in found.content["stages"][-1]["nodes"]} == {"", *HOSTILE}
    assert len(found.scripts) == 3
    assert f"{HOSTILE[0]} {HOSTILE[1]} own 4.6 kB" in found.text
    assert "img" not in {tag for tag, _ in found.tags}
