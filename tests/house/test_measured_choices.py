"""Compare what the docs say about choices behind the recipes with the records of the measurements."""

from statistics import mean, stdev

from records import SMOLLM2, page, percent, results


def rows_of(weight, activation, model=SMOLLM2, calibration="64x512", bits=None):
    """By name: the records of a pair of formats."""
    wanted = (weight, activation, model, calibration)
    return {
        r["recipe"]: r
        for r in results("choices.jsonl")
        if (r["weight"], r["activation"], r["model"], r["calibration"]) == wanted and bits in (None, r["bits"])
    }


def kl(record):
    return record["halves"]["first"]["kl"]


def closed(record):
    """The share of the gap, on the second half."""
    rows = results("accuracy.jsonl")
    (floor,) = {
        row["rtn_nll"]
        for row in rows
        if all(row[key] == record[key] for key in ("weight", "activation", "model")) and row["rtn_nll"]
    }
    second = record["halves"]["second"]
    return percent((floor - second["nll"]) / (floor - second["float_nll"]))


def test_the_table_of_choices():
    """KL on the first half and its change to the recipe, paired over windows; the share of the gap on the second."""
    text = page("docs/accuracy.md")
    for row in results("choices.jsonl"):
        pair = row["weight"], row["activation"]
        base = rows_of(*pair, row["model"], row["calibration"]).get("recipe", row)
        pairs = list(zip(*(each["halves"]["first"]["windows"] for each in (row, base)), strict=True))
        changes = [own[1] - of_base[1] for own, of_base in pairs]
        change = f" ({mean(changes):+.4f} ± {stdev(changes) / len(changes) ** 0.5:.4f})" if any(changes) else ""
        variant = row["model"].removeprefix(SMOLLM2).strip()
        formats = ", ".join((*pair, variant) if variant else pair)
        windows = row["calibration"].partition("x")[0]
        cells = formats, row["recipe"], f"{row['bits']:.2f}", windows, f"{kl(row):.4f}{change}", closed(row)
        assert f"| {' | '.join(cells)} |" in text
        assert (row["seed"], len(changes), len(row["halves"]["second"]["windows"])) == (0, 8, 16)


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
    shares = [closed(integers[name]) for name in ("allocate", "recipe")]
    assert "`allocate`** close {} of the gap in place of {}".format(*shares) in text


def test_what_any_order_could_win_back():
    (row,) = results("order-limit.jsonl")
    *_, sorted_, best = sorted(value for name, value in row.items() if name.startswith("own "))
    assert (sorted_, best) == (row["own weight"], row["own exchanged"])
    text = page("docs/accuracy.md")
    assert f"an order of its own, no more than {percent(best)} of what planting adds to the squared error" in text
    assert f"won back, by exchanges, and {percent(sorted_)} sorted by weights" in text


ORDERS = {
    "none": "as it is",
    "random{seed=0;values=stream}": "random",
    "permute{values=stream}": "`permute{values=stream}`",
    "stream{key=nearest}": "nearest",
    "stream{key=exchanged}": "exchanged",
}


def test_the_order_of_the_residual_stream():
    text = page("docs/accuracy.md")
    rows = {(r["model"].removeprefix(SMOLLM2).strip(), r["order"]): r for r in results("stream-orders.jsonl")}
    for order, name in ORDERS.items():
        written = "{kl:.3f}" if order == "none" else "{kl:.3f} ({change:+.3f} ± {standard_error:.3f})"
        cells = [written.format(**rows[model, order]) for model in ("planted", "off-grid-planted")]
        assert f"| {name} | {' | '.join(cells)} |" in text
    assert {model for model, _ in rows} == {"", "off-grid", "planted", "off-grid-planted"}
    plain = [rows[model, "none"]["kl"] for model in ("", "off-grid")]
    assert "outliers KL is {:.3f}, off-grid {:.3f} (".format(*plain) in text

    def won_back(order):
        before = rows["off-grid-planted", "none"]["kl"]
        return percent((before - rows["off-grid-planted", order]["kl"]) / (before - plain[1]))

    assert f"exchanges win back {won_back('stream{key=exchanged}')}** of what" in text
    assert f"sorted by weights it wins {won_back('permute{values=stream}')}." in text
    planted = {order: rows["planted", order]["change"] for order in ORDERS}
    assert f"a random one costs {planted['random{seed=0;values=stream}']:.3f}," in text
    assert min(change for order, change in planted.items() if order != "none") > 0


STEPS = {"round-weights": "`round-weights`", "gptq": "`gptq`", "tune-vectors": "and vectors", "distill": "and weights"}


def chain(name, last="gptq"):
    """The record of a chain after a pass."""
    (row,) = (r for r in results("chains.jsonl") if r["recipe"] == name and last_pass(r) == last)
    return row


def last_pass(row):
    return row["pipeline"].split(" | ")[-2].partition("{")[0]


def paired(row, base, half):
    """The change in KL to another record and its standard error over windows, as text."""
    pairs = zip(*(each["halves"][half]["windows"] for each in (row, base)), strict=True)
    changes = [own[1] - of_base[1] for own, of_base in pairs]
    return f"{mean(changes):+.4f} ± {stdev(changes) / len(changes) ** 0.5:.4f}"


def test_the_table_of_steps():
    text = page("docs/accuracy.md")
    for row in results("chains.jsonl"):
        halves = row["halves"]
        has_floor = any(r["rtn_nll"] and r["weight"] == row["weight"] for r in results("accuracy.jsonl"))
        windows = (row.get("folded", row["calibration"]), row["calibration"], row.get("trained", "-"))
        cells = (
            f"{row['weight']}, {row['activation']}", row["recipe"], STEPS[last_pass(row)], f"{row['bits']:.2f}",
            "/".join(each.partition("x")[0] for each in windows), *(f"{half['kl']:.4f}" for half in halves.values()),
            closed(row) if has_floor else "-",
        )  # fmt: skip
        assert f"| {' | '.join(cells)} |" in text
        assert (row["seed"], [len(half["windows"]) for half in halves.values()]) == (0, [8, 16])


def test_what_is_said_about_steps():
    text = " ".join(page("docs/accuracy.md").split())
    gptq, rotate = chain("gptq"), chain("rotate")
    assert f"changes KL on the first half by {paired(chain('pull 0.1'), gptq, 'first')}, and raises" in text
    assert chain("pull 0.1")["halves"]["second"]["nll"] > gptq["halves"]["second"]["nll"]
    assert f"KL on the first half changes by {paired(chain('scales by the diagonal'), gptq, 'first')}:" in text
    longer = [paired(chain("rotate 64"), rotate, half) for half in ("first", "second")]
    assert "change KL by {} on the first half and by {} on the second".format(*longer) in text
    assert f"alike (`rotate, allocate`), close {closed(chain('rotate, allocate', 'tune-vectors'))} of the gap" in text
    nearest, by_gptq = chain("allocate"), chain("allocate by gptq")
    assert f"KL behind `gptq` changes by {paired(by_gptq, nearest, 'first')} on the first half" in text
    tuned = chain("allocate by gptq", "tune-vectors")
    assert f"with vectors {closed(tuned)} of the gap are closed" in text
    each = chain("allocate each weight by gptq, blocks of 16 too", "tune-vectors")
    assert f"changes KL by another {paired(each, tuned, 'first')}, and closes {closed(each)}." in text
    before, after = (chain("allocate each weight, blocks of 16 too", last) for last in ("tune-vectors", "distill"))
    assert (
        f"changes KL by {paired(after, before, 'first')}, and closes {closed(after)} in place of {closed(before)}"
        in text
    )
    said = " ".join(page("docs/recipes.md").split())
    assert f"`--bits 4.5` closes {closed(tuned)} of the gap to float" in said
    assert f"up to 8 bits too, {closed(chain('rotate, allocate', 'tune-vectors'))}." in said


ERROR = "permute{by=error;weight=W;activation=A}"
ERROR_STREAM = "permute{by=error;weight=W;activation=A;values=stream}"
ROUNDED = {
    "round-weights{format=W}": "to nearest",
    "awq-fold{weight=W;activation=A} | round-weights{format=W}": "`awq-fold`, to nearest",
    "gptq{format=W;activation=A;correction=0.25}": "`gptq`",
    "awq-fold{weight=W;activation=A} | gptq{format=W;activation=A;correction=0.25}": "`awq-fold`, `gptq`",
}


def test_orders_by_the_expected_error():
    """A line for each model and rounding, random orders as their mean and range; what planting took and orders won."""
    text, records = page("docs/accuracy.md"), results("permute-error.jsonl")
    found = {}
    for row in records:
        found.setdefault((row["model"].removeprefix(SMOLLM2).strip(), row["behind"]), {})[row["order"]] = row
    for (model, behind), rows in found.items():
        changed = {name: "{kl:.3f} ({change:+.3f} ± {standard_error:.3f})".format(**row) for name, row in rows.items()}
        cells = [f"{rows['none']['kl']:.3f}", *(changed.get(name, "-") for name in (ERROR, ERROR_STREAM, "permute"))]
        luck = sorted(row["kl"] for name, row in rows.items() if name.startswith("random"))
        cells.append(f"{sum(luck) / len(luck):.3f} ({luck[0]:.3f} to {luck[-1]:.3f})" if luck else "-")
        assert f"| {model or 'original'}, {ROUNDED[behind]} | {' | '.join(cells)} |" in text
    nearest = {model: rows for (model, behind), rows in found.items() if behind.startswith("round")}

    def won_back(planted, original, order):
        taken = nearest[planted]["none"]["kl"] - nearest[original]["none"]["kl"]
        return percent(-nearest[planted][order]["change"] / taken)

    for planted, original in (("planted", ""), ("off-grid-planted", "off-grid")):
        shares = [won_back(planted, original, order) for order in (ERROR, ERROR_STREAM, "permute")]
        assert "{} of what the planting took, {} by the stream alone; sorted by weights {}".format(*shares) in text
    assert (
        "planted outliers too, by {change:+.3f} ± {standard_error:.3f}".format(**nearest["off-grid"][ERROR_STREAM])
        in text
    )
    costs = [nearest["off-grid-planted"][o]["kl"] - nearest["off-grid"][o]["kl"] for o in (ERROR_STREAM, "none")]
    assert "planting costs {:.3f} in place of {:.3f}".format(*costs) in text
