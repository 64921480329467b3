"""Compare what the docs say about accuracy and coverage with the records of the measurements.

The other numbers: `test_measured_numbers.py`.
"""

import importlib.util
import math
import re
from statistics import mean

from documents import ROOT
from records import SMOLLM2, accuracy, page, percent, results

from mxcompile.passes.recipes import RECIPES
from mxcompile.pipeline.pipeline import Pipeline

ACCURACY = (
    "rtn",
    "smooth-quant",
    "smooth-quant searched",
    "awq-fold",
    "awq-fold + gptq",
    "awq-fold + gptq + tune-vectors",
)


def test_the_accuracy_of_algorithms():
    """The gap of every pair of formats, and the shares closed; a dash where nothing was measured."""
    records = results("accuracy.jsonl")
    text = page("docs/accuracy.md")
    for pair in dict.fromkeys((r["weight"], r["activation"]) for r in records if r["rtn_nll"]):
        rows = {r["recipe"]: r for r in records if (r["weight"], r["activation"], r["model"]) == (*pair, SMOLLM2)}
        first = next(iter(rows.values()))
        shares = [percent(rows[name]["gap_closed"]) if name in rows else "-" for name in ACCURACY]
        gap = first["rtn_nll"] - first["float_nll"]
        assert f"| {pair[0]}, {pair[1]} | {gap:.3f} | {' | '.join(shares)} |" in text


def trained_by(row):
    """The rate of a record of `learned.jsonl`, how it was rotated if not by Hadamard matrices, and its stated steps."""
    rate = re.search(r"rate=([0-9.]+)", row["recipe"])[1] + (", matrices" if "wush" in row["recipe"] else "")
    return rate + (f", {row['losses'][-1][0]} steps" if "epochs" in row["recipe"] else "")


def test_what_training_weights_gains():
    text, rows = page("docs/accuracy.md"), results("learned.jsonl")
    pairs = {}
    for row in rows:
        if not row["recipe"].startswith("learn-rounding"):
            pairs.setdefault((row["weight"], row["activation"]), []).append(row)
    assert len(pairs) == 4
    for (weight, activation), of_pair in pairs.items():
        chain = [row for row in of_pair if "losses" not in row]
        shares = [percent(row["gap_closed"]) for row in chain] + ["-"] * (3 - len(chain))
        latents = [row for row in of_pair if "losses" in row]
        last = ", ".join(f"{percent(row['gap_closed'])} (rate {trained_by(row)})" for row in latents)
        assert f"| {weight}, {activation} | {' | '.join(shares)} | {last} |" in text
    _, vectors, weights = pairs["mxint4", "mxint8"][:3]
    recipe = RECIPES["w4a8-mxint-distilled"].replace(",epochs=5", "")
    formats = weights["recipe"].replace("=W", "=mxint4").replace("=A", "=mxint8").replace(";", ",")
    assert recipe == f"{formats} | lower-mx{{weight=mxint4,activation=mxint8}}"
    assert f"perplexity {weights['perplexity']:.2f} in place of {vectors['perplexity']:.2f}" in text
    helps = weights["help_nll"], vectors["help_nll"], weights["float_help_nll"]
    assert "{:.3f} nats a token in place of {:.3f} (float {:.3f})".format(*helps) in text
    small, large, *_ = (row["losses"] for row in pairs["mxfp4", "none"][3:])
    rises = [max(loss for _, loss in losses) / losses[0][1] - 1 for losses in (small, large)]
    assert f"by {percent(rises[0])} at 0.004 and {percent(rises[1])} at 0.01" in text
    (learned,) = (row for row in rows if row["recipe"].startswith("learn-rounding"))
    assert f"in place of `gptq` closes {percent(learned['gap_closed'])} at mxfp4, none" in text
    (large,) = results("learning-h200.jsonl")
    assert f"take it {large['seconds']} s on an H200 with {large['windows']} windows and 50 steps" in text
    assert f"({large['peak_gb']} GB), all 32 about {large['model_seconds']:.0f} s" in text
    (small,) = results("learning-cpu.jsonl")
    seconds = small["model_seconds"], small["segments"][-1]
    assert "takes about {:.0f} s on 2 CPU cores, {:.0f} of them for the segment with the head".format(*seconds) in text


def test_recipes_that_train_from_latents():
    """Each is what was measured at the rate with the least loss on held-out batches, but for the number of steps."""
    text, trained = page("docs/accuracy.md"), [r for r in results("learned.jsonl") if "last_training_loss" in r]
    rows, (whole, longer) = trained[:-2], trained[-2:]
    helps, shares, steps = [], [], []
    for name, activation in (("w4a16", "none"), ("w4a8", "mxfp8_e4m3"), ("w4a4", "mxfp4")):
        of_pair = [row for row in rows if row["activation"] == activation]
        best = min((row for row in of_pair if "wush" not in row["recipe"]), key=lambda row: row["losses"][-1][1])
        measured = best["recipe"].replace("=W", "=mxfp4").replace("=A", f"={activation}").replace(";", ",")
        pipeline = Pipeline.parse(f"{measured} | lower-mx{{weight=mxfp4,activation={activation}}}")
        recipe = re.sub(r"steps=\d+", f"steps={best['losses'][-1][0]}", RECIPES[f"{name}-mxfp-distilled"])
        assert str(Pipeline.parse(recipe.replace(",epochs=5", ""))) == str(pipeline)
        vectors = [r for r in results("learned.jsonl") if r["activation"] == activation and "losses" not in r][1]
        assert vectors["weight"] == "mxfp4"
        helps.append(f"{best['help_nll']:.3f}{' nats a token' * (not helps)} in place of {vectors['help_nll']:.3f}")
        shares.append(f"{best['gap_closed']:.0%}".rstrip("%"))
        steps.append([row["losses"][-1][0] for row in of_pair])
        if activation == "none":
            assert (
                f"{best['last_training_loss']:.3f} on batches that are trained on, {best['losses'][-1][1]:.3f}" in text
            )
    said = "{}, {} and {} % of the gap, the last after {} steps, and as much after the {} that the recipes have"
    assert said.format(*shares, steps[2][0], whole["losses"][-1][0]) in text
    assert f"{whole['gap_closed']:.0%}" == f"{shares[2]}%"
    assert RECIPES["w4a4-mxfp-distilled"].count(f"steps={whole['losses'][-1][0]}") == 1
    assert "{} by vectors, {}, {} (float 2.341)".format(*helps) in text
    described = "{} and {} (mxfp4, none), {} and {} (mxfp8_e4m3), {}, {} and {} (mxfp4, mxfp4)"
    assert described.format(*steps[0], *steps[1], *steps[2]) in text
    plain, *_, matrices = (row for row in rows if row["activation"] == "mxfp4")
    closed = percent(matrices["gap_closed"]), percent(plain["gap_closed"])
    perplexities = matrices["perplexity"], plain["perplexity"]
    assert "closes {} with training, in place of {}".format(*closed) in text
    assert "perplexity {:.2f} in place of {:.2f}".format(*perplexities) in text
    count, closed = longer["losses"][-1][0], percent(longer["gap_closed"])
    losses = matrices["losses"][-1][1], longer["losses"][-1][1], longer["last_training_loss"]
    assert f"{count} steps close no more, {closed}" in text
    assert "from {:.3f} to {:.3f}: it is {:.3f} on batches that are trained on".format(*losses) in text


def test_what_four_bits_of_inputs_and_of_weights_cost():
    text, halves = page("docs/accuracy.md"), [row["halves"]["second"] for row in results("parts.jsonl")]
    plain, inputs, weights = (half["nll"] - half["float_nll"] for half in halves)
    assert f"they cost {inputs:.3f} nats ({plain:.3f} without both)" in text
    assert f"4-bit weights by `gptq` with float inputs {weights:.3f}" in text
    (gap,) = {r["rtn_nll"] - r["float_nll"] for r in results("learned.jsonl") if r["activation"] == "mxfp4"}
    assert f"inputs alone leave {percent(1 - inputs / gap)} of the gap closed" in text


def test_an_adapter_on_packed_weights():
    text, (floating, packed, nearest, gptq, _) = page("docs/training.md"), results("training-h200.jsonl")
    assert (nearest["gptq"], gptq["gptq"]) == (False, True)
    assert f"falls from {packed['test_before']:.3f} to {packed['test_after']:.3f}" in text
    assert f"nearest it is {nearest['test_merged']:.3f} again, by GPTQ {gptq['test_merged']:.3f}" in text
    sizes = packed["model_bytes"] / 1e6, floating["model_bytes"] / 1e6, 16 * packed["adapter_values"] / 1e6
    assert "takes {:.0f} MB ({:.0f} in bfloat16), adapters and their optimizer {:.0f}".format(*sizes) in text
    assert f"the other {packed['activation_bytes'] / 1e6:.0f} MB of the peak" in text


def test_weights_that_train_rounded():
    text, row = page("docs/training.md"), results("training-h200.jsonl")[-1]
    assert row["way"] == "qad:w4a4-mxfp-quick"
    assert row["equal_bits"]
    assert f"text that it has not seen falls from {row['kl_before']:.3f} to {row['kl_after']:.3f}" in text
    assert f"{row['peak_bytes'] / 1e9:.1f} GB at the peak" in text


def test_mixed_formats_at_equal_bytes():
    text, (*rows, drawn) = page("docs/accuracy.md"), results("allocation.jsonl")
    assert f"(Spearman) of {drawn['spearman']:.2f}, and the measured is {drawn['slope']:.2f} times the expected" in text
    measured = {(row["choice"], row["behind"], row["bits"]): row for row in rows}
    columns = [(behind, bits) for behind in ("rtn", "recipe") for bits in (4.5, 5.0, 6.0)]
    assert {(row["behind"], row["bits"]) for row in rows} == {*columns}
    for choice in dict.fromkeys(row["choice"] for row in rows):
        of_choice = [measured.get((choice, *column)) for column in columns]
        cells = [f"{row['perplexity']:.2f} ({row['kl']:.3f})" if row else "-" for row in of_choice]
        assert f"| {'`allocate`' if choice == 'allocate' else choice} | {' | '.join(cells)} |" in text
    for column in columns:
        others = [row for row in rows if (row["behind"], row["bits"]) == column and row["choice"] != "allocate"]
        best = measured["allocate", *column]
        assert others
        assert all(best["kl"] < row["kl"] and best["perplexity"] < row["perplexity"] for row in others)
        assert all(abs(best["bytes"] / row["bytes"] - 1) < 2e-3 for row in others)
    expected = {
        behind: [measured["allocate", behind, bits]["predicted_kl"] for bits in (4.5, 5.0, 6.0)]
        for behind in ("rtn", "recipe")
    }
    assert "the expected KL was {:.3f}, {:.3f} and {:.3f}:".format(*expected["rtn"]) in text
    assert "it was {:.3f}, {:.3f} and {:.3f}.".format(*expected["recipe"]) in text
    assert f"float: {math.exp(rows[0]['float_nll']):.2f}" in text


def test_the_times_by_which_formats_are_chosen():
    rows = results("gemm-h100.jsonl")
    us = {
        row["weight"]: row["us"]
        for row in rows
        if (row.get("m"), row.get("n"), row.get("k"), row.get("path")) == (1, 6144, 4096, "planes")
    }
    times = (
        f"takes {us['mxint4']:.1f} us at one token in mxint4, {us['mxint6']:.1f} us in mxint6 and {us['mxint8']:.1f}"
    )
    assert times in page("docs/recipes.md")


def test_what_is_said_about_accuracy():
    text = page("docs/accuracy.md")
    whole = "awq-fold + gptq + tune-vectors"
    four = accuracy("mxint4", "mxint8", whole)
    assert f"recipe closes {percent(accuracy('mxint4', 'mxint8', whole, f'{SMOLLM2} off-grid')['gap_closed'])}" in text
    ocp, plain = math.exp(four["rtn_nll"]), math.exp(four["float_nll"])
    assert f"is {ocp:.1f} rounded with OCP's scales and {four['perplexity']:.1f} by the recipe" in text
    assert f"{plain:.2f} perplexity in float" in text
    eight = accuracy("mxint8", "mxint8", whole)
    assert f"is {100 * (math.exp(eight['nll'] - eight['float_nll']) - 1):.2f} % above float" in text
    floating = accuracy("mxfp4", "mxfp8_e4m3", "gptq + tune-vectors")
    assert f"alone close {percent(floating['gap_closed'])}" in text
    rotated = accuracy("mxfp4", "mxfp4", "awq-fold + rotate + gptq + tune-vectors")
    assert f"closes {percent(rotated['gap_closed'])} (perplexity {rotated['perplexity']:.2f})" in text
    options = {
        row["recipe"]: row["gap_closed"]
        for row in results("gptq-options.jsonl")
        if (row["weight"], row["activation"], row["tokens"]) == ("mxfp4", "mxfp4", 8192)
    }
    (turned,) = (gap for recipe, gap in options.items() if recipe.startswith("awq-fold{") and "rotate" in recipe)
    assert f"rotating closes {percent(turned)} in place of {percent(options['awq-fold + gptq'])}" in text
    off_grid = accuracy("mxint4", "mxint8", whole, f"{SMOLLM2} off-grid")
    assert f"costs {off_grid['rtn_nll'] - off_grid['float_nll']:.3f} nats" in text


def test_planted_outliers():
    """What planting costs, and the share of it that each fold wins back."""
    text, lost, back = page("docs/accuracy.md"), [], {"smooth-quant": [], "awq-fold": []}
    for weight in ("mxint4", "mxint8"):
        plain, planted = (accuracy(weight, "mxint8", "rtn", name)["nll"] for name in (SMOLLM2, f"{SMOLLM2} planted"))
        lost.append(planted - plain)
        for recipe, shares in back.items():
            nll = accuracy(weight, "mxint8", recipe, f"{SMOLLM2} planted")["nll"]
            shares.append((planted - nll) / (planted - plain))
    assert "another {:.3f} nats at mxint4, mxint8 and {:.3f} at mxint8, mxint8".format(*lost) in text
    for recipe, shares in back.items():
        words = f"`{recipe}` wins back" if recipe == "smooth-quant" else f"`{recipe}`"
        assert f"{words} {percent(shares[0])} and {percent(shares[1])}" in text


COMBINATIONS = ("RTN", "GPTQ", "SmoothQuant", "AWQ", "SmoothQuant+GPTQ", "AWQ+GPTQ", "GPTQ, SmoothQuant", "GPTQ, AWQ")


def study_rows():
    """The rows of the study's table from its cells: weights, whose GPTQ, and perplexities by combination."""
    values, exact = {}, 0.0
    for cell in results("study-cells.jsonl"):
        name, _, kind = cell["recipe"].removesuffix(")").partition(" (")
        weight = cell["weight"] if ":" in cell["weight"] else f"{cell['weight']}:32"
        values[weight, kind, name] = cell["perplexity"]
        exact = math.exp(cell["reference_nll"])
    rows = []
    for weight, kind in dict.fromkeys((weight, kind) for weight, kind, _ in values if kind):
        of_row = {name: values.get((weight, kind, name)) or values[weight, "", name] for name in COMBINATIONS}
        rows.append({"weight": weight, "gptq": kind, "perplexity": of_row, "float": exact})
    return rows


def test_the_study():
    text = page("docs/accuracy.md")
    for row in study_rows():
        values = row["perplexity"].values()
        cells = [f"**{value:.2f}**" if value == min(values) else f"{value:.2f}" for value in values]
        assert f"| {row['weight']} | {row['gptq']} | {' | '.join(cells)} |" in text


def test_what_is_said_about_the_study():
    text, rows = page("docs/accuracy.md"), study_rows()
    four = [row for row in rows if row["weight"].startswith(("mxint4", "mxfp4"))]
    best = {
        kind: [min(row["perplexity"], key=row["perplexity"].get) == "AWQ+GPTQ" for row in four if row["gptq"] == kind]
        for kind in ("paper", "ours")
    }
    assert "in {} of {} formats and blocks with the paper's GPTQ".format(*_counts(best["paper"])) in text
    assert "in {} of {} with ours".format(*_counts(best["ours"])) in text
    smooth, awq = (
        [row["perplexity"][f"GPTQ, {fold}"] > row["perplexity"][f"{fold}+GPTQ"] for row in rows]
        for fold in ("SmoothQuant", "AWQ")
    )
    assert "SmoothQuant after GPTQ is worse than before it in {} of {} rows".format(*_counts(smooth)) in text
    assert "AWQ after GPTQ is worse than before it in {} of {}:".format(*_counts(awq)) in text
    ratios = [row["perplexity"]["GPTQ, SmoothQuant"] / row["perplexity"]["SmoothQuant+GPTQ"] for row in four]
    assert f"with {min(ratios):.1f} to {max(ratios):.0f} times the perplexity at 4 bits" in text
    eight = [max(row["perplexity"].values()) / row["float"] - 1 for row in rows if row["weight"].startswith("mxint8")]
    assert f"all are within {100 * max(eight):.1f} % of float" in text


def test_the_recipe_of_8_bit_floats():
    """The chain with the least KL on the first half, and what is said of the others."""
    text, rows = page("docs/accuracy.md"), [r for r in results("chains.jsonl") if r["weight"] == "mxfp8_e4m3"]
    first = {(r["recipe"], r["pipeline"].split(" | ")[-2].partition("{")[0]): r["halves"]["first"]["kl"] for r in rows}
    assert min(rows, key=lambda row: row["halves"]["first"]["kl"])["recipe"] == "gptq alone"
    assert str(Pipeline.parse(RECIPES["w8a8-mxfp"])) == rows[-1]["pipeline"]
    second = [{key: math.exp(rows[i]["halves"]["second"][key]) for key in ("nll", "float_nll")} for i in (0, -1)]
    nearest, best = second
    above = f"{best['nll']:.2f}, {100 * (best['nll'] / best['float_nll'] - 1):.1f} % above float"
    assert f"perplexity {above}; {nearest['nll']:.2f} rounded to nearest" in text
    tuned, to_nearest = first["gptq alone", "tune-vectors"], first["to nearest", "round-weights"]
    assert tuned == first["gptq alone", "gptq"]
    assert f"KL on the first half is {tuned:.4f} nats, {to_nearest:.4f} to nearest." in text
    assert f"With SmoothQuant in front it is {first['smooth-quant, gptq', 'tune-vectors']:.4f}." in text
    paper = [first["smooth-quant, gptq (paper)", last] for last in ("gptq", "tune-vectors")]
    assert "leave {:.4f}, and {:.4f} with vectors".format(*paper) in text


def _counts(flags):
    return sum(flags), len(flags)


def test_other_projects():
    """Every row of the table, the best first."""
    rows = {row["row"]: row for row in results("peers.jsonl")}
    text = page("docs/accuracy.md")
    names = {
        "mxfp4, mxcompile: `awq-fold`, `gptq`, `tune-vectors`": "mxcompile-tuned-mxfp4",
        "mxfp4, mxcompile: `awq-fold`, `gptq`": "mxcompile-gptq-mxfp4",
        "mxfp4, auto-round {version}": "auto-round-signed-gradient-mxfp4",
        "mxfp4, llm-compressor {version}, GPTQ": "llm-compressor-gptq-mxfp4",
        "int4 in groups of 32, llm-compressor {version}, GPTQ": "llm-compressor-gptq-int4",
        "mxfp4, torchao {version}, rounded": "torchao-rtn-rceil-mxfp4",
        "int4 in groups of 32, torchao {version}, rounded": "torchao-rtn-int4",
    }
    for name, key in names.items():
        row = rows[key]
        cells = (name.format(**row), f"{row['bits']:g}", f"{row['perplexity']:.2f}", f"{100 * row['gap_closed']:.0f} %")
        assert f"| {' | '.join(cells)} |" in text
        assert row["text"] == "wikitext2-validation.txt, second half"


def test_the_costs_of_a_quantized_head():
    scores = {(line["recipe"], line["variant"], line["head"]): line for line in results("head.jsonl")}
    text = page("docs/recipes.md")
    for recipe, variant in {key[:2] for key in scores}:
        of_head = {head: line for (*key, head), line in scores.items() if key == [recipe, variant]}
        perplexities = [
            f"{of_head[head]['perplexity']:.2f}" for head in ("none", "mxint8", "mxfp8_e4m3") if head in of_head
        ]
        cells = [f"`{recipe}`", variant, *perplexities, *[""] * (3 - len(perplexities))]
        cells += [f"{of_head[head]['kl']:.3f}" for head in ("none", "mxint8")]
        assert "|".join((cell and f" {cell} ") or " " for cell in cells) in text, (recipe, variant)


def test_the_accuracy_of_aligned_activations():
    text, values, errors = page("docs/kernels.md"), {}, []
    for row in results("aligned.jsonl"):
        if "recipe" in row:
            values[row["recipe"].split("weight=")[1].split(",")[0], "align" in row["recipe"], row["nudged"]] = row
        else:
            errors.append(100 * row["output_error"])
    (plain, other), (aligned, other_aligned), (nudged, other_nudged) = (
        [f"{values[weight, *kind]['perplexity']:.2f}" for weight in ("mxfp4", "mxint4")]
        for kind in ((False, False), (True, False), (False, True))
    )
    assert f"{plain} without and {aligned} with alignment in `mxfp4`, {other} and {other_aligned} in `mxint4`" in text
    assert f"gives {nudged} and {other_nudged}" in text
    assert f"an error of {min(errors):.0f} to {max(errors):.0f} %" in text


def test_experts_with_few_tokens():
    text, lines = page("docs/accuracy.md"), results("expert-calibration.jsonl")
    ways = ("own", "shrinkage 1", "shrinkage 2", "shrinkage 8", "all")
    assert {line["test_tokens"] for line in lines} == {25400}
    assert {(line["steps"], line["format"], line["model"]["num_experts"]) for line in lines} == {(2000, "mxfp4", 16)}
    nearest, ratios, spread = {round(line["kl"], 4) for line in lines if line["way"] == "nearest"}, {}, []
    assert f"to nearest it is {nearest.pop()} (" in text
    for tokens in (256, 1024, 4096, 16384):
        of_size = [line for line in lines if line["calibration_tokens"] == tokens]
        counts = next(line["expert_tokens"] for line in of_size if line["way"] == "own")
        kl = {way: mean(line["kl"] for line in of_size if line["way"] == way) for way in {r["way"] for r in of_size}}
        row = f"| {tokens} | {', '.join(map(str, counts))} | {' | '.join(f'{kl[way]:.4f}' for way in ways)} |"
        assert row in text
        ratios[tokens] = kl["shrinkage 2"] / kl["own"], kl["all"] / kl["own"]
        shrunk = [value for way, value in kl.items() if way.startswith("shrinkage")]
        spread.append(max(shrunk) / min(shrunk))
        assert tokens != 256 or kl["own"] > kl["nearest"]
    assert max(abs(ratios[tokens][0] - 1) for tokens in (4096, 16384)) < 0.02
    low, high = (ratios[tokens][1] - 1 for tokens in (4096, 16384))
    assert f"each are {percent(low)} to {percent(high)} worse" in text
    assert f"differ by at most {percent(math.ceil(100 * max(spread) - 100) / 100)}" in text


def test_the_demo():
    text = page("docs/benchmarks.md")
    rows = {row["recipe"]: row for row in results("eval.jsonl")}
    for recipe, row in rows.items():
        quantized, plain = row["model"], row["reference"]
        change = quantized["perplexity"] / plain["perplexity"] - 1
        assert f"| float32 | 100 % | {plain['perplexity']:.2f} | | |" in text
        kl = f"{row['kl']:.{3 if row['kl'] < 0.1 else 2}f}"
        cells = (
            f"`{recipe}`",
            percent(quantized["bytes"] / plain["bytes"]),
            f"{quantized['perplexity']:.2f} ({100 * change:+.{1 if change < 0.1 else 0}f} %)",
            kl,
            percent(row["top1"]),
        )
        assert f"| {' | '.join(cells)} |" in text
        assert (row["tokens"], row["length"]) == (8188, 2048)
    assert len(rows) == 2


def test_the_table_of_architectures():
    """As `python docs/folds_table.py` writes it."""
    spec = importlib.util.spec_from_file_location("folds_table", ROOT / "docs" / "folds_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "folds.md").read_text()
    assert text.endswith(f"\n{module.folds_table()}\n")
    records = results("folds.jsonl")
    table = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    keys = ("architecture", "groups", "folded", "multiplied", "skipped")
    assert table == [tuple(str(record[key]) for key in keys) for record in records]
    assert min(min(record["sqnr_db_smooth"], record["sqnr_db_awq"]) for record in records) > 111
    assert f"{len(records)} architectures, " in text


def test_orders_of_architectures():
    text, records = page("docs/folds.md"), results("orders.jsonl")
    worst = min(record["sqnr_db"] for record in records)
    assert f"in the same {len(records)} architectures" in text
    assert f"agree to {int(worst)} dB or better" in text
    whole = [record for record in records if not record["fixed"]]
    streams = [record for record in records if record["stream"]]
    assert f"In {len(streams)} of them the residual stream has an order, in {len(whole)} every matmul input" in text


ORDERS = ("none", "permute", "permute{by=activation}", "random{seed=0}")


def test_the_order_of_channels():
    """A line for each model and rounding: KL, its change and the change's standard error; a dash if not measured."""
    text, records = page("docs/accuracy.md"), [r for r in results("permute.jsonl") if "fine" not in r["order"]]
    assert {(r["tokens"], r["length"], r["weight"], r["activation"]) for r in records} == {
        (2048, 512, "mxint4", "mxint8")
    }
    for model, behind in dict.fromkeys((r["model"], r["behind"]) for r in records):
        rows = {r["order"]: r for r in records if (r["model"], r["behind"]) == (model, behind)}
        changed = {name: "{kl:.3f} ({change:+.3f} ± {standard_error:.3f})".format(**row) for name, row in rows.items()}
        cells = [f"{rows['none']['kl']:.3f}", *(changed.get(name, "-") for name in ORDERS[1:])]
        variant = model.removeprefix(SMOLLM2).strip() or "original"
        assert f"| {variant}, `{behind.partition('{')[0]}` | {' | '.join(cells)} |" in text


def test_what_sorting_wins_back():
    text = page("docs/accuracy.md")
    records = [record for record in results("permute.jsonl") if record["behind"].startswith("round-weights")]
    kl = {(r["model"].removeprefix(SMOLLM2).strip(), r["order"]): r["kl"] for r in records}
    assert f"as much on the original: {kl['', 'permute{values=hidden}']:.3f}" in text

    def won_back(variant, order):
        return percent((kl[variant, "none"] - kl[variant, order]) / (kl[variant, "none"] - kl["", "none"]))

    assert f"sorting wins back {won_back('planted-hidden', 'permute')} of what the planting took" in text
    by_activation = won_back("planted", "permute{by=activation}")
    assert f"{won_back('planted', 'permute')} is won back, by activations {by_activation}." in text


def test_a_matrix_for_each_block():
    text = page("docs/accuracy.md")
    for row in results("rotations.jsonl"):
        cells = [f"{row['weight']}, {row['activation']}"]
        for rounding in ("rtn", "gptq"):
            errors = row[f"{rounding} by_value"].values()
            wins = sum(wush < hadamard for _, hadamard, wush in errors)  # of errors with five digits
            assert abs(row[f"{rounding} wins"] - wins) <= 1
            cells += [f"{row[f'{rounding} wins']} of {row['values']}", f"{row[f'{rounding} over_hadamard']:.2f}"]
        assert f"| {' | '.join(cells)} |" in text


def test_block_sizes_by_matrix():
    """fine-blocks, and one block size for all; blocks of 32 were measured with the orders of channels."""
    text, records = page("docs/accuracy.md"), results("fine-blocks.jsonl")
    allocated = records[-1]
    assert allocated["order"].startswith("allocate{formats=[mxint4:128;mxint4:64;mxint4;mxint4:16];bits=4.25")
    uniform = [r for r in results("permute.jsonl") if r["order"] == "none" and r["behind"].startswith("round-weights")]
    for row in (*records, *(r for r in uniform if r["model"] in {record["model"] for record in records})):
        variant = row["model"].removeprefix(SMOLLM2).strip() or "original"
        block = row["weight"].partition(":")[2] or 32
        chosen = {"fine-blocks": "`fine-blocks`", "allocate": "`allocate` over blocks of 16 to 128"}
        what = chosen.get(row["order"].partition("{")[0], f"blocks of {block}")
        assert f"| {variant}, {what} | {row['bits']:.3f} | {row['kl']:.3f} |" in text


def test_the_tables_of_the_zoo():
    """As `python docs/architectures_table.py` writes them."""
    spec = importlib.util.spec_from_file_location("architectures_table", ROOT / "docs" / "architectures_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "architectures.md").read_text()
    assert text.endswith(f"\n{module.BEGIN}{module.tables()}\n")
    rows = re.findall(r"^\| (\w+) \| \d* \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(record["architecture"] for record in results("zoo.jsonl"))


def test_what_calibration_data_are_worth():
    """KL by row and text; the shares that the text says."""
    rows = {row["calibration"]: [text["kl"] for text in row["texts"]] for row in results("calibration-data.jsonl")}
    text = page("docs/calibration.md")
    names = {
        "file": "C4, windows of 512",
        "help topics": "other help topics, windows of 512",
        "own text": "the model's own text, windows of 512",
        "file, mixed": "C4, windows of 128, 512 and 2048, each window alike",
        "file, [mixed]": "C4, the same windows, each token alike",
    }
    assert list(rows) == list(names)
    for key, name in names.items():
        assert f"| {name} | {' | '.join(f'{kl:.3f}' for kl in rows[key])} |" in text
    (short, long, topics), of_topics, own = rows["file"], rows["help topics"], rows["own text"]
    assert f"lose {percent(1 - of_topics[2] / topics)} less than with web text" in text
    low, high = sorted((of_topics[0] / short - 1, of_topics[1] / long - 1))
    assert f"Wikipedia then loses {100 * low:.0f} to {percent(high)} more" in text
    assert f"within {percent(max(own[0] / short, own[1] / long) - 1)}, and better for help topics" in text
    assert own[2] < topics
    changes = [100 - 100 * mixed / plain for mixed, plain in zip(rows["file, [mixed]"], rows["file"], strict=True)]
    assert f"with each token alike {min(changes):.0f} to {max(changes):.0f} % less is lost" in text
    assert f"with each window alike up to {percent(rows['file, mixed'][1] / long - 1)} more on long windows" in text
    assert {row["calibration_tokens"] for row in results("calibration-data.jsonl")} == {6144}
