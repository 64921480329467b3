"""Compare what the docs say about choices behind the recipes with the records of the measurements."""

from statistics import mean, stdev

from records import SMOLLM2, accuracy, page, percent, results


def rows_of(weight, activation):
    """By name: the records of a pair of formats."""
    return {r["recipe"]: r for r in results("choices.jsonl") if (r["weight"], r["activation"]) == (weight, activation)}


def kl(record):
    return record["halves"]["first"]["kl"]


def test_the_table_of_choices():
    """KL on the first half and its change to the recipe, paired over windows; the share of the gap on the second."""
    text = page("docs/accuracy.md")
    for pair in (("mxint4", "mxint8"), ("mxfp4", "mxfp4")):
        rows = rows_of(*pair)
        floor = accuracy(*pair, "rtn")["rtn_nll"]
        base = [each[1] for each in rows["recipe"]["halves"]["first"]["windows"]]
        for name, row in rows.items():
            changes = [each[1] - of_base for each, of_base in zip(row["halves"]["first"]["windows"], base, strict=True)]
            change = f" ({mean(changes):+.4f} ± {stdev(changes) / len(changes) ** 0.5:.4f})" if any(changes) else ""
            second = row["halves"]["second"]
            share = percent((floor - second["nll"]) / (floor - second["float_nll"]))
            cells = (", ".join(pair), name, f"{row['bits']:.2f}", f"{kl(row):.4f}{change}", share)
            assert f"| {' | '.join(cells)} |" in text
            assert (row["calibration"], row["seed"], len(changes), len(second["windows"])) == ("64x512", 0, 8, 16)
            assert row["model"] == SMOLLM2


def test_what_is_said_about_choices():
    text, integers, floats = page("docs/accuracy.md"), rows_of("mxint4", "mxint8"), rows_of("mxfp4", "mxfp4")
    orders = [kl(integers[name]) for name in ("permute in front", "permute behind awq-fold")]
    random = [kl(integers[f"random order, seed {seed}"]) for seed in (0, 1)]
    gains = [100 - 100 * order / other for order in orders for other in random]
    assert f"{min(gains):.0f} to {max(gains):.0f} % better than random orders" in text
    mixed = [kl(integers[f"{name}, allocate"]) for name in ("permute in front", "permute behind awq-fold")]
    low, high = sorted(100 - 100 * value / kl(integers["allocate"]) for value in mixed)
    assert f"it takes {low:.0f} to {high:.0f} % off the KL" in text
    base = kl(floats["recipe"])
    low, high = sorted(100 - 100 * kl(floats[f"random order, seed {seed}"]) / base for seed in (0, 1))
    loss = 100 * kl(floats["permute in front"]) / base - 100
    assert f"sorting loses {loss:.0f} %, and random orders are {low:.0f} to {high:.0f} % better" in text
    assert f"takes {percent(1 - kl(floats['rotate{kind=wush}']) / base)} off the KL at mxfp4, mxfp4" in text
    for name in ("through linears", "through linears, allocate"):
        other = integers["recipe" if name == "through linears" else "allocate"]
        pairs = zip(*(row["halves"]["first"]["windows"] for row in (integers[name], other)), strict=True)
        changes = [own[1] - of_other[1] for own, of_other in pairs]
        assert abs(mean(changes)) < 2 * stdev(changes) / len(changes) ** 0.5
    shares = [(3.8233 - integers[name]["halves"]["second"]["nll"]) / 0.4171 for name in ("allocate", "recipe")]
    assert "`allocate`** close {} of the gap in place of {}".format(*map(percent, shares)) in text
