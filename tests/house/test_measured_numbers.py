"""Compare each number in README.md and docs/ with the record of its measurement in benchmarks/results.

Those of accuracy: `test_measured_accuracy.py`; of mixtures of experts: `test_measured_experts.py`.
"""

import math
import re

from documents import ROOT
from records import accuracy, page, percent, results

from mxcompile.formats import parse_format


def layer_ratio(lines):
    """How many times as fast as cuBLAS the four matmuls of a layer are together."""
    assert len({(line["n"], line["k"]) for line in lines}) == len(lines) == 4
    return sum(line["cublas_bf16_us"] for line in lines) / sum(line["us"] for line in lines)


def gpu_ratios():
    """(format or "format, project", tokens) -> ratio to cuBLAS, of all that were measured."""
    measured = {}
    for line in results("gemm-h100.jsonl"):
        if "us" in line:
            who = "" if line["path"] in ("planes", "gluon", "dequantize+cublas") else f", {line['path']}"
            measured.setdefault((line["weight"] + who, line["m"]), []).append(line)
    return {key: layer_ratio(lines) for key, lines in measured.items()}


def fp8_ratio(weight, activation):
    lines = results("fp8-h100.jsonl")
    return layer_ratio([line for line in lines if (line["weight"], line["activation"]) == (weight, activation)])


ALL = "qkv o gate_up down"
"""All matmuls of a layer, in records of layer_chain.py."""


def test_the_recipes_of_readme():
    """The size of a recipe that was not measured follows from one that was, as its weights have as many bits."""
    sizes = {
        parse_format(name).bits: row["deployed MB"]
        for name, row in zip(("mxint8", "mxint4"), results("costs.jsonl"), strict=False)
    }
    gpu, cpu = gpu_ratios(), {(row["way"], row["dtype"]): row["decode"] for row in results("decode-cpu.jsonl")}
    plain = cpu["float compiled", "bfloat16"]
    learned = "awq-fold + gptq + tune-vectors"
    rows = {
        "w8a8-mxint": ("mxint8", "mxint8", learned, "w8a8-mxint-quick"),
        "w8a8-mxint-quick": ("mxint8", "mxint8", "rtn", "w8a8-mxint-quick"),
        "w4a8-mxint": ("mxint4", "mxint8", learned, "w4a8-mxint-quick"),
        "w4a8-mxint-quick": ("mxint4", "mxint8", "rtn", "w4a8-mxint-quick"),
        "w4a8-mxfp": ("mxfp4", "mxfp8_e4m3", "gptq + tune-vectors", None),
        "w4a4-mxfp": ("mxfp4", "mxfp4", "awq-fold + rotate + gptq + tune-vectors", None),
    }
    text = page("README.md")
    for name, (weight, activation, algorithm, way) in rows.items():
        row = accuracy(weight, activation, algorithm)
        prefill = fp8_ratio(weight, activation) if activation == "mxfp4" else gpu[weight, 2048]
        cells = [
            f"`{name}`",
            f"{sizes[parse_format(weight).bits]:.0f} MB",
            f"{row['rtn_nll'] - row['float_nll']:.3f}",
            percent(row["gap_closed"]),
            f"{cpu[way, 'bfloat16'] / plain:.1f} x" if way else "",
            f"{gpu[weight, 1]:.2f} x",
            f"{prefill:.2f} x",
        ]
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in text
    assert f"| float | {results('costs.jsonl')[0]['model MB']:.0f} MB |" in text
    assert f"against compiled bfloat16 ({plain} a second)" in text
    assert f"generates {results('decode-h100.jsonl')[1]['ratio']} times as many tokens a second" in text


def test_the_costs_of_quantizing():
    text = page("docs/benchmarks.md")
    rows = {row["pipeline"]: row for row in results("large-h100.jsonl")}
    assert f"{rows['rtn']['seconds_32_layers']:.0f} s to round" in text
    assert f"{rows['gptq']['seconds_32_layers']:.0f} s with `gptq`" in text
    assert f"at most {rows['gptq']['peak_gib_32_layers']:.1f} GiB" in text
    plain = results("costs.jsonl")[:2]
    seconds = sorted(row["total seconds"] for row in plain)
    assert "take {:.0f} to {:.0f} s".format(*seconds) in text
    assert {f"{row['peak over model bytes']:.1f}" for row in plain} == {"2.4"}
    assert "2.4 times the model's bytes of memory" in text
    learned = results("costs.jsonl")[-1]["seconds of passes"]
    assert f"`awq-fold` takes {learned['awq-fold']:.0f} s and `gptq` after it {learned['gptq']:.0f} s" in text


def test_the_tokens_a_second_on_the_cpu():
    """Ratios are to the compiled float model in the same dtype."""
    rows = {(row["way"], row["dtype"]): row for row in results("decode-cpu.jsonl")}
    ways = {
        "float, eager": "float eager",
        "float, compiled": "float compiled",
        "`w4a8-mxint-quick`": "w4a8-mxint-quick",
        "the same, output head in `mxint8`": "w4a8-mxint-quick, head mxint8",
        "`w8a8-mxint-quick`": "w8a8-mxint-quick",
    }
    text = (ROOT / "docs/benchmarks.md").read_text()
    shown = re.findall(r"^\| (.*) \| (b?float\d+) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert len(shown) == 7
    for name, dtype, *cells in shown:
        plain = rows["float compiled", dtype]
        for kind, digits, cell in zip(("decode", "prefill"), (1, 0), cells, strict=True):
            value = rows[ways[name], dtype][kind]
            ratio = "" if name.startswith("float") else f" ({value / plain[kind]:.1f} x)"
            assert cell == f"{value:.{digits}f}{ratio}"
    llama = rows["llama.cpp", "q4_1"]
    assert f"| llama.cpp, Q4_1, output head in 8 bits | | {llama['decode']:.1f} | {llama['prefill']:.0f} |" in text
    ours = rows["w4a8-mxint-quick, head mxint8", "bfloat16"]
    assert f"generates {ours['decode'] / llama['decode']:.2f} times as many tokens a second" in text
    assert f"reads a prompt {ours['prefill'] / llama['prefill']:.2f} times as fast" in text


def test_the_tokens_a_second_without_avx512():
    rows = {row["way"]: row for row in results("decode-avx2.jsonl")}
    ours, plain = rows["w4a8-mxint-quick"], rows["float eager"]
    ratio = ours["decode"] / plain["decode"]
    text = page("docs/benchmarks.md")
    assert f"generates {ours['decode']} tokens a second and the float model {plain['decode']} ({ratio:.1f} x)" in text
    assert f"of a prompt of 64 tokens they read {ours['prefill']} and {plain['prefill']} a second" in text
    assert f"A generated token takes {ours['token_cpu_ms']} and {plain['token_cpu_ms']} ms of CPU time" in text


def test_the_tokens_a_second_beside_processes_that_compute():
    rows = {(row["way"], row.get("spinning", 0)): row for row in results("decode-busy.jsonl")}
    text = page("docs/benchmarks.md")
    for beside in (0, 4, 8):
        ours, plain = rows["w4a8-mxint-quick", beside], rows["float eager", beside]
        cells = [
            f"{plain[kind]:.{digits}f} | {ours[kind]:.{digits}f} ({ours[kind] / plain[kind]:.1f} x)"
            for kind, digits in (("decode", 1), ("prefill", 0))
        ]
        assert f"| {beside} | {' | '.join(cells)} |" in text


def test_a_whole_model_on_an_h200():
    rows = {(row["recipe"], row["batch"]): row for row in results("decode-h200.jsonl")}
    text, ours = page("docs/benchmarks.md"), "w4a8-mxint-quick, head mxint8"
    for name, key, batch in (
        ("a token of `generate`, ms", "token_ms", 1),
        ("with temperature and top-p", "sampled_token_ms", 1),
        ("a step of 8 prompts", "token_ms", 8),
        ("a step of 32 prompts", "token_ms", 32),
        ("a prompt of 2048 tokens", "prefill_ms", 1),
        ("its kernels", "prefill_kernels_ms", 1),
    ):
        before, after = rows["bfloat16", batch][key], rows[ours, batch][key]
        assert f"| {name} | {before:.2f} | {after:.2f} ({before / after:.2f} x) |" in text
    float_, step = rows["bfloat16", 1], rows[ours, 1]
    assert f"kernels run for {step['step_ms']:.2f} of {step['token_ms']:.2f} ms" in text
    before, after = float_["token_ms"], step["token_ms"]
    assert f"On an H200 a token takes {after:.2f} ms in place of {before:.2f} ({before / after:.2f} x)" in page(
        "README.md"
    )
    said = f"A token of the whole model takes {after:.2f} ms, and its kernels {step['step_ms']:.2f}"
    assert said in page("docs/kernels.md")


def test_the_seconds_to_the_first_token():
    cold, warm = results("first-token-cpu.jsonl")
    assert [(row["caches"], row["way"]) for row in (cold, warm)] == [("cold", "layers once"), ("warm", "layers once")]
    text = page("docs/faq.md")
    assert f"gave its first token after {cold['first_s']:.1f} s" in text
    assert f"is compiled, after {cold['second_s']:.1f} s" in text
    assert f"with full caches, {warm['first_s']:.1f} and {warm['second_s']:.1f} s" in text


def test_the_first_token_on_a_gpu():
    rows = {(row["way"], row["caches"]): row for row in results("first-token-h200.jsonl")}
    text = page("docs/benchmarks.md")
    cold, warm = rows["layers once", "cold"], rows["layers once", "warm"]
    assert f"| compiled as a whole | first and second token | {rows['whole', 'cold']['second_s']:.1f} s | |" in text
    assert f"| equal layers compiled once | first token | {cold['first_s']:.1f} s | {warm['first_s']:.1f} s |" in text
    assert f"| | second token | {cold['second_s']:.1f} s | {warm['second_s']:.1f} s |" in text
    assert all((row["layers"], row["prompt"]) == (32, 512) for row in rows.values())


def test_layers_once_are_as_accurate_as_whole_graphs():
    rows = results("layers-once-h200.jsonl")
    text = page("docs/benchmarks.md")
    for recipe in ("w4a16-mxint-quick", "w4a8-mxint-quick"):
        plain = {
            row["way"]: row["from_float32"]
            for row in rows
            if row["recipe"] == recipe and not row.get("emulate_precision_casts")
        }
        cells = " | ".join(f"{plain[way]:.4f}" for way in ("layers once", "whole", "uncompiled"))
        assert f"| `{recipe}` | {cells} |" in text


def test_the_speeds_on_a_gpu():
    """All that were measured, ours and others'."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    shown = {}
    for name, cells in re.findall(r"^\| (mx\w+(?:, [^|]+)?) \|((?: [\d.]* ?x? ?\|){6})$", text, re.MULTILINE):
        for tokens, cell in zip((1, 16, 64, 256, 2048, 8192), cells.split("|"), strict=False):
            if cell.strip():
                shown[name, tokens] = cell.strip()
    assert shown == {key: f"{ratio:.2f} x" for key, ratio in gpu_ratios().items()}


def test_matmuls_on_an_h200():
    measured = {}
    for line in results("gemm-tuned-h200.jsonl"):
        if "us" in line:
            measured.setdefault(line["weight"], {}).setdefault(line["m"], []).append(line)
    assert set(measured) == {"mxint4", "mxfp4"}
    for weight, by_tokens in measured.items():
        assert list(by_tokens) == [1, 4, 16, 32, 64, 256, 2048]
        cells = " | ".join(f"{layer_ratio(lines):.2f} x" for lines in by_tokens.values())
        assert f"| {weight} | {cells} |" in page("docs/benchmarks.md")


def test_what_was_tried_on_an_h200():
    best = {}
    for line in results("gemm-sweep-h200.jsonl"):
        if "quick_us" in line:
            sliced, dependent = "slices" in line["config"], int(line["config"].get("dependent", 0))
            case = line["path"], line["weight"], line["m"], sliced, dependent
            shapes = best.setdefault(case, {})
            shape = line["n"], line["k"]
            shapes[shape] = min(line["quick_us"], shapes.get(shape, math.inf))
    totals = {case: f"{sum(shapes.values()):.1f}" for case, shapes in best.items() if len(shapes) == 4}
    text = page("docs/kernels.md")
    for words, sliced, dependent in (
        ("the kernel as it is, configs of an H100 among others", False, 0),
        ("the same, dependent launch", False, 1),
        ("K divided among the warps of a program", True, 0),
        ("the same, dependent launch", True, 1),
    ):
        cells = " | ".join(totals["planes", weight, 1, sliced, dependent] for weight in ("mxint4", "mxfp4"))
        assert f"| {words} | {cells} |" in text
    assert f"at 32 tokens in MXINT4 {totals['planes', 'mxint4', 32, False, 0]}" in text
    assert f"64 tokens took {totals['gluon', 'mxint4', 64, False, 1]} us in MXINT4" in text
    today = [line for line in results("gemm-h200.jsonl") if (line.get("weight"), line.get("m")) == ("mxint4", 1)]
    assert f"take {sum(line['us'] for line in today):.1f} us with the configs of the H100" in text
    (wrong,) = (line for line in results("gemm-sweep-h200.jsonl") if "failed" in line)
    assert (wrong["m"], wrong["n"], wrong["config"]) == (64, 28672, {"rows": 64, "out": 64, "split": 2, "stages": 3})


def test_one_token_on_an_h200():
    best = {}
    for line in results("gemm-configs-h200.jsonl"):
        if line.get("path") == "held" and "quick_us" in line and not line["config"].get("dependent"):
            shapes, shape = best.setdefault((line["weight"], line["m"]), {}), (line["n"], line["k"])
            shapes[shape] = min(line["quick_us"], shapes.get(shape, math.inf))
    totals = {case: f"{sum(shapes.values()):.1f}" for case, shapes in best.items() if len(shapes) == 4}
    text = page("docs/kernels.md")
    cells = " | ".join(totals[weight, 1] for weight in ("mxint4", "mxfp4", "mxint8"))
    assert f"| held_planes.py | {cells} |" in text
    six = list(best["mxfp6_e2m3", 1].values())
    assert "**6 bits**: {}, {} and {} us for the first three".format(*six) in text
    assert f"**4 tokens**: {totals['mxint4', 4]} us in MXINT4" in text
    assert f"Measured: {best['mxint4', 1][28672, 4096]:.1f} in place of" in text


def test_the_fp8_path():
    text = page("docs/kernels.md")
    for activation, words in (
        ("mxfp4", "{:.2f} x as fast as cuBLAS in bfloat16 with weights in `mxint4` and {:.2f} x in `mxfp4`"),
        ("mxfp8_e4m3", "{:.2f} x and {:.2f} x cuBLAS for weights in `mxint4` and `mxfp4`"),
    ):
        assert words.format(fp8_ratio("mxint4", activation), fp8_ratio("mxfp4", activation)) in text
    lines = results("fp8-h100.jsonl")
    lost = {(line["activation"], line["weight"], line["k"]): line["error"] / line["rounding"] for line in lines}
    assert all(ratio <= 1.2 for key, ratio in lost.items() if key[0] == "mxfp4" or key[2] == 4096)
    wide = [lost["mxfp8_e4m3", weight, 14336] for weight in ("mxint4", "mxfp4")]
    assert "loses {:.2f} and {:.2f} times what rounding to bfloat16 does".format(*wide) in text


def test_the_times_of_a_whole_model():
    plain, ours = results("decode-h100.jsonl")
    text = page("docs/benchmarks.md")
    prefill = f"{ours['prefill_ms']:.1f} ({ours['prefill_ratio']} x)"
    for row in (
        f"| a token of `generate`, ms | {plain['token_ms']:.2f} | {ours['token_ms']:.2f} ({ours['ratio']} x) |",
        f"| its kernels, ms | {plain['step_ms']:.2f} | {ours['step_ms']:.2f} ({ours['step_ratio']} x) |",
        f"| a prompt of 2048 tokens, ms | {plain['prefill_ms']:.1f} | {prefill} |",
        f"| weights, GiB | {plain['gib']:.2f} | {ours['gib']:.2f} |",
    ):
        assert row in text
    words = f"takes {ours['token_ms']:.2f} ms, of which kernels take {ours['step_ms']:.2f}"
    assert words in page("docs/kernels.md")


def test_the_host_between_two_decode_steps():
    rows = results("generate-loop-h200.jsonl")
    text = page("docs/kernels.md")
    token = {(row["choice"], row["way"]): row["token_us"] for row in rows if row["measured"] == "token"}
    greedy, sampled = ((token[choice, "ours"], token[choice, "transformers"]) for choice in ("greedy", "sampled"))
    assert f"takes {greedy[0]} us, sampled {sampled[0]}, in place of {greedy[1]} and {sampled[1]} in" in text
    (step,) = (row for row in rows if row["measured"] == "step")
    assert f"{step['launches']:.0f} launches and {step['kernels_us']} us of kernels" in text
    added = [round(row["added_us"]) for row in rows if row["measured"] == "after" and row["batch"] == 1]
    assert f"takes {added[0]} us with a vocabulary of 128,256" in text
    assert f"{added[1]} with temperature and top-p, {added[2]} with top-k too" in text


def test_the_costs_of_checkpoints():
    row = results("saving.jsonl")[-1]
    text = page("docs/benchmarks.md")
    extra = row["weight file bytes"] - row["stored bytes"] + row["index bytes"]
    size = (
        f"{row['stored bytes'] / 1e6:.1f} MB (the embedding is float32), and {extra / 1e3:.0f} kB of headers and index"
    )
    assert f"| weights | {size} |" in text
    times, again = (
        (f"{row[f'{kind} load seconds']:.2f} s", f"{row[f'{kind} peak over stored']:.2f} times")
        for kind in ("verified", "unverified")
    )
    assert f"| load | {times[0]} and {times[1]} the weights' bytes of memory |" in text
    assert re.search(rf"\| load, `verify=False` \| {again[0]} and {again[1][:4]}", text)
    first, second = (row[f"{process} process forward seconds"] for process in ("first", "second"))
    assert f"| first call with `compile=True` | {first:.0f} s |" in text
    assert f"| first call in a second process, graphs from torch's cache | {second:.0f} s |" in text


def test_what_a_call_costs_the_host():
    rows = {(row["code"], row["call"]): row["us"] for row in results("host-time-h200.jsonl") if row["rows"] == 2048}
    calls = ("mx::linears mxfp4 x bf16", "mx::linears mxint4 x mxint8")
    us = [rows[code, call] for call in calls for code in ("before", "plans")]
    text = page("docs/kernels.md")
    assert "from {:.0f} to {:.0f} us with MXFP4 weights and from {:.0f} to {:.0f} in W4A8".format(*us) in text
    later = [rows["launches", call] for call in calls[:2]]
    assert "started directly {:.0f} and {:.0f} on a slower host".format(*later) in text
    assert f"where `torch.mul` took {rows['plans', 'torch.mul']:.0f};" in text
    assert f"where it took {rows['launches', 'torch.mul']:.0f} (" in text


def test_a_chain_of_layers():
    text, rows = page("docs/kernels.md"), results("layer-chain-h200.jsonl")
    times = {(row["early"], row["changed"]): f"{row['layer_us']:.1f} us" for row in rows if row["changed"] in ("", ALL)}
    all_early = [times["small matmuls", ALL], times["small matmuls", ""], times["small matmuls integers", ""]]
    assert f"| attention | {times['', ALL]} | {times['', '']} | |" in text
    assert f"| norms and gated products, too | | {times['small', '']} | |" in text
    assert f"| matmuls, too, but not those | | {times['matmuls', '']} | |" in text
    assert f"| all | {' | '.join(all_early)} |" in text
    assert f"Measured: {all_early[1].removesuffix(' us')} to {all_early[2]};" in text
    words = " ".join(text.split())
    for early in ("small matmuls", "small matmuls integers"):
        changed = [row for row in rows if row["early"] == early and row["changed"] not in ("", ALL)]
        others = [
            " and ".join(f"{row['layer_us']:.1f}" for row in changed if row["changed"] == role) for role in ALL.split()
        ]
        assert "with others {} for q/k/v, {} for o, {} for gate and up, {} for `down`".format(*others) in words


def test_small_kernels():
    """The default config of attention is that of the table; `default` in the record is the one before it."""
    text, rows = page("docs/kernels.md"), results("small-kernels-h200.jsonl")
    attention = [row for row in rows if row["kernel"] == "attend_next"]
    for batch, keys in {(row["batch"], row["keys"]): None for row in attention}:
        parts = 16 if (batch, keys) == (1, 2048) else 32 if batch == 1 else 4
        config = {"batch": batch, "keys": keys, "splits": parts, "block": 64, "warps": 8, "dependent": True}
        (row,) = [row for row in attention if config.items() <= row.items()]
        cells = f"{row['us']:.2f} | {row['floor']:.2f} | {percent(row['share'])}"
        assert f"| {batch}, {keys} | {parts} | {cells} |" in text
    (before,) = [row for row in attention if row.get("default") and (row["batch"], row["keys"]) == (1, 2048)]
    assert f"8.9 us in place of {before['us']:.1f} for 2048 keys" in text
    (norm, early), (wide, wide_early), (narrow, narrow_early) = (
        [row["us"] for row in rows if row.get("rows") == 1 and row.get(name) == value]
        for name, value in (("warps", 16), ("tile", 256), ("tile", 128))
    )
    assert f"{norm:.1f} us for a norm with its residual sum, {wide:.1f} for a gated product" in text
    assert f"256 values and {narrow:.1f} in tiles of 128." in text
    assert f"{early:.1f}, {wide_early:.1f} and {narrow_early:.1f}." in text


def test_the_diagnosis():
    text, (planted, plain, hidden) = page("docs/diagnosis.md"), results("diagnosis.jsonl")
    assert planted["named"] == planted["named_planted"] == planted["planted"]
    assert plain["named"] == 0
    assert f"of {planted['planted']} of its {planted['layers']} layers" in text
    assert f"no layer exceeds {plain['largest_other_imbalance']:.0f}" in text
    assert f"these have at least {planted['least_planted_imbalance']:.0f}" in text
    improved, advised = zip(*(_steps(row) for row in (planted, plain, hidden)), strict=True)
    assert f"improves {improved[0]} of {advised[0]} layers of the planted" in text
    assert f", {improved[1]} of {advised[1]} of the model as it is, and {improved[2]} of {advised[2]} with" in text
    assert (hidden["permute_advised"], hidden["permute_improved"]) == (2, 1)  # "twice", "once"
    assert min(a / b for a, b in zip(improved, advised, strict=True)) > 0.9


def _steps(row):
    steps = ("fold", "permute", "rotate", "bits")
    return [sum(row.get(f"{step}_{kind}", 0) for step in steps) for kind in ("improved", "advised")]


def test_models_larger_than_memory():
    text = page("docs/large_models.md")
    (gpu,) = [row for row in results("large.jsonl") if row["benchmark"] == "model-free" and row["device"] == "cuda"]
    assert f"{gpu['source bytes'] / 1e9:.0f} GB in Llama-3-8B's shape took {gpu['seconds']:.0f} s on an H200" in text
    assert f"{gpu['device peak bytes'] / 2**30:.1f} GiB on the GPU" in text
    small = [row for row in results("low-memory.jsonl") if row["model"] == "SmolLM2-135M"]
    files, memory = (row for row in small if "processes" not in row)
    assert (files["weights"], memory["weights"], files["same bytes"]) == ("files", "memory", True)
    assert f"SmolLM2 in float32 has {files['model MB']} MB" in text
    own, share = files["anonymous MB"], files["anonymous over model"]
    assert f"on {files['calibration']} windows of 512 tokens, needed {own} MB beside" in text
    assert f"cache of files, {share} of that; with the model in memory they needed {memory['anonymous MB']} MB" in text
    assert share <= 0.6
    files, memory = (row for row in small if row.get("processes") == 2)
    assert files["same bytes"]
    assert f"needed {files['anonymous MB']} MB in the first beside the cache of files, and" in text
    assert f"and {memory['anonymous MB']} MB with the model in memory" in text
    large = [row for row in results("low-memory.jsonl") if row["model"] == "Llama-3-8B shape, 24 layers"]
    rounded, learned = (row["anonymous MB"] / 1000 for row in large[-2:])  # in a control group with 3 GB
    assert f"A model of {large[-1]['model MB'] / 1000:.0f} GB" in text
    assert f"the process itself held at most {rounded:.1f} and {learned:.2f} GB" in text
    gpu = [row for row in results("low-memory.jsonl") if row.get("device", "").startswith("NVIDIA")]
    first, second = (
        (gpu[2], gpu[3]),
        (gpu[5], gpu[6]),
    )  # the pair before is older; gpu[4] is of the commit that it names
    for pair in (first, second):
        assert [row["weights"] for row in pair] == ["files", "memory"]
    times = [f"{files['seconds']} s to {memory['seconds']}" for files, memory in (first, second)]
    ratios = " and ".join(f"{files['seconds'] / memory['seconds']:.2f}" for files, memory in (first, second))
    assert f"took {ratios} times as long from files as in memory in two runs, {times[0]} and" in text
    assert times[1].replace(" s to", " to") in text
    gib, other = (max(pair[i]["device MB"] for pair in (first, second)) * 1e6 / 2**30 for i in (0, 1))
    assert f"with at most {gib:.1f} GiB of the GPU's memory in place of {other:.1f}" in text


def test_several_processes():
    text = page("docs/large_models.md")
    ranks = [row for row in results("large.jsonl") if row["benchmark"] == "ranks" and row["device"] == "cpu"]
    few, many = sorted((row for row in ranks if row["layers"] == 8), key=lambda row: row["windows"])
    parts = [row["gptq seconds"] for row in (many, few)], [row["gptq seconds, 1 process"] for row in (many, few)]
    (after, after_few), (before, before_few) = parts
    words = f"takes {after:.1f} s in place of {before:.1f} ({many['gptq speedup']} x) for {many['windows']} windows"
    assert words in text
    assert f"and {after_few:.1f} in place of {before_few:.1f} ({few['gptq speedup']} x) for {few['windows']}" in text
    assert all(row["same bytes"] for row in ranks)


def test_several_gpus():
    text = page("docs/large_models.md")
    rows = results("large.jsonl")
    (gpus,) = [row for row in rows if row["benchmark"] == "ranks" and row["device"] == "cuda"]
    after, before = gpus["gptq seconds"], gpus["gptq seconds, 1 process"]
    assert f"takes {after:.1f} s in place of {before:.1f} ({gpus['gptq speedup']} x), with at most" in text
    assert f"{gpus['peak GiB']:.1f} GiB of each GPU's memory in place of {gpus['peak GiB, 1 process']:.1f}" in text
    whole = f"{gpus['whole seconds']:.1f} s in place of {gpus['whole seconds, 1 process']:.1f}"
    assert f"the whole call takes {whole}" in text
    rest, times = gpus["whole seconds"] - after, 32 / gpus["layers"]
    assert f"{after * times:.0f} s of `gptq` in place of {before * times:.0f}, and a whole call" in text
    assert f"of {after * times + rest:.0f} to {after * times + rest * times:.0f} s, depending" in text
    assert gpus["same bytes"]
    (small,) = [row for row in rows if row["benchmark"] == "ranks" and row["layers"] == 2]
    assert f"is {small['distance']} times as far" in text
    assert f"{small['error']} times as far from the float model" in text
    assert f"{gpus['distance']:.2f} and {gpus['error']:.2f} on the two GPUs" in text


def test_the_parts_of_a_prompt():
    text, (few, many) = page("docs/kernels.md"), results("prefill-parts-cpu.jsonl")
    assert (few["tokens"], many["tokens"]) == (512, 1024)
    last = "output head, all tokens (`generate` asks for the last one's: {} and {})"
    rows = {
        "matmuls of 30 layers, by torch": "matmuls",
        "decoding their weights, MXINT4": "decoding",
        "rounding their inputs, MXINT8": "rounding",
        last.format(few["head of the last token"], many["head of the last token"]): "head of all tokens",
        "attention, torch's kernel with a mask": "attention",
        "attention as two matmuls and a softmax, 64 queries at a time": "attention in rows",
        "the same without the keys after them": "attention in rows, with the keys before",
    }
    for words, name in rows.items():
        assert f"| {words} | {few[name]} | {many[name]} |" in text
    added = [(row["decoding"] + row["rounding"]) / row["matmuls"] for row in (many, few)]
    assert "adds {} to the matmuls of 1024 tokens ({} at 512)".format(*map(percent, added)) in text
    assert f"and {many['attention'] / many['matmuls']:.1f} times as long at 1024" in text
    saved = few["attention"] - few["attention in rows"]
    whole = sum(few[name] for name in ("matmuls", "decoding", "rounding", "head of all tokens", "attention"))
    assert f"save {saved:.0f} ms of 512 tokens, {percent(saved / whole)} of these parts" in text
    errors = few["error of attention in rows"], few["error of attention"]
    assert "error from float64 is {} of it in place of {}".format(*errors) in text
