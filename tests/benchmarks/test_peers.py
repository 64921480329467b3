"""The benchmark of other projects compares weights of equal size in the same layers, or stops."""

import json

import peer_runs
import peers
import pytest
import torch

from mxcompile.formats import FORMATS
from mxcompile.pipeline.pipeline import Pipeline

EXACT = {"a.weight": torch.linspace(-1, 1, 64).view(1, 64), "norm": torch.ones(4)}


def test_accepts_sixteen_values_a_group():
    weight = (EXACT["a.weight"] * 7.5).round() / 7.5
    peers.check("row", {**EXACT, "a.weight": weight}, EXACT, {"a.weight"})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "a.weight"),
        ({"a.weight": torch.zeros(1, 64), "norm": torch.zeros(4)}, "norm"),
        ({"a.weight": EXACT["a.weight"] * 2}, "32 values"),
    ],
)
def test_refuses_other_weights_and_more_bits(changed, reason):
    with pytest.raises(SystemExit, match=reason):
        peers.check("row", {**EXACT, **changed}, EXACT, {"a.weight"})


def test_rows_are_chosen_by_pattern():
    assert peers.wanted("torchao-rtn-int4,mxcompile-floor-*") == [peers.FLOOR, "torchao-rtn-int4"]
    with pytest.raises(SystemExit, match="no row is called 'torcha'"):
        peers.wanted("torcha")


def test_the_floor_is_measured_once_for_the_same_texts(tmp_path):
    out = tmp_path / "peers.jsonl"
    assert peers.measured(peers.FLOOR, {"test": "a"}, out) == []
    rows = [{"row": peers.FLOOR, "test": test, "nll": nll} for test, nll in (("a", 1), ("a", 2), ("b", 3))]
    out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert peers.measured(peers.FLOOR, {"test": "a"}, out) == rows[1:2]
    assert peers.measured("torchao-rtn-int4", {"test": "a"}, out) == []


@pytest.mark.parametrize(("fmt", "passes"), peers.OURS.values(), ids=peers.OURS)
def test_our_pipelines_are_for_weights_alone(fmt, passes):
    assert "activation=" not in str(Pipeline.parse(f"{passes} | lower-mx{{weight={fmt}}}"))
    assert FORMATS[fmt].bits_per_value == peers.BITS[fmt]


@pytest.mark.parametrize("name", peer_runs.PEERS)
def test_peers_are_pinned_and_have_a_script(name):
    peer = peer_runs.PEERS[name]
    assert all("==" in package for package in peer.packages)
    assert (peer_runs.SCRIPTS / peer.script).exists()
    assert {row[0] for row in peers.THEIRS} == set(peer_runs.PEERS)


def test_a_failure_says_what_to_read(tmp_path):
    log = tmp_path / "row.log"
    with pytest.raises(SystemExit, match=r"row failed: sh: .*\nRead .*row.log"):
        peer_runs.run("row", ["sh", "-c", "echo sh: no; exit 3"], log)
    assert log.read_text() == "sh: no\n"
