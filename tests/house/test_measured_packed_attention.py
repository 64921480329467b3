"""Compare what docs/kernels.md says about attention over packed keys and values with its record."""

from records import page, results

RUN, BEFORE = "exact tokens in a tile", "fewer waits"
PACKED = ("mxint8", "mxint6", "mxint4")
SHAPES = ((1, 2048), (1, 8192), (1, 32768))


def lines(run):
    """By kernel, batch and tokens, with a mask."""
    rows = [row for row in results("cache-attention-h200.jsonl") if row.get("run") == run]
    return {(row["kernel"], row["batch"], row["tokens"]): row for row in rows if row.get("masked", True)}


def test_the_tables():
    text, rows = page("docs/kernels.md"), lines(RUN)
    for batch, tokens in SHAPES:
        of = {kernel: row for (kernel, *shape), row in rows.items() if shape == [batch, tokens]}
        alone = [f"{of[name]['us']:.2f} ({of[name]['ratio']:.2f})" for name in PACKED]
        floats = f"{of['attend']['us']:.2f} | {of['torch']['us']:.2f}"
        assert f"| {batch}, {tokens} | {floats} | {' | '.join(alone)} |" in text
        steps = [f"{of[name]['us']:.2f}" for name in ("attend_next", *(f"{name}, next" for name in PACKED))]
        exact = [f"{of[f'{name}, exact']['us']:.2f}" for name in PACKED]
        assert f"| {batch}, {tokens} | {' | '.join(steps)} | {' | '.join(exact)} |" in text


def test_what_each_form_took():
    text, before, rows = " ".join(page("docs/kernels.md").split()), lines("slices"), lines(BEFORE)
    long = [before[name, 1, 32768]["us"] for name in ("mxint8", "mxint4")]
    assert f"Measured: {long[0]:.1f}, {long[1]:.1f} (26.0 with three stages) and 36 to 38" in text
    sweep = [row for row in results("cache-attention-h200.jsonl") if row.get("run") == "slices, sweep"]
    best = min(row["us"] for row in sweep if (row["kernel"], row["tokens"]) == ("mxint4", 32768) and "splits" in row)
    assert f"{best:.1f}" == "26.0"
    short = [before[name, 1, 2048]["us"] for name in ("mxint8", "mxint4")]
    assert f"and {short[0]:.1f} and {short[1]:.1f} for 2048 tokens" in text
    long, short = ([rows[name, 1, tokens]["us"] for name in PACKED] for tokens in (32768, 2048))
    assert f"Measured: {long[0]:.1f}, {long[2]:.1f} and {long[1]:.1f}; {short[0]:.1f} and {short[2]:.1f};" in text
    exact = [rows["mxint4, exact", 1, tokens]["us"] for tokens in (32768, 2048)]
    assert f"{exact[0]:.1f} us in MXINT4 for 32768 tokens and {exact[1]:.1f} for 2048" in text
    crowded, batch = before["attend", 8, 8192]["us"], rows["attend", 8, 8192]["us"]
    assert f"{crowded:.1f} us for eight sequences of 8192 tokens, then {batch:.1f} (predicted 76)" in text
    rows = lines(RUN)
    exact = [rows["mxint4, exact", 1, tokens]["us"] for tokens in (32768, 2048)]
    more = [us - rows["mxint4", 1, tokens]["us"] for us, tokens in zip(exact, (32768, 2048), strict=True)]
    measured = f"{exact[0]:.1f} us in MXINT4 for 32768 tokens and {exact[1]:.1f} for 2048"
    assert f"Measured: {measured}, {more[0]:.1f} and {more[1]:.1f} more than without" in text


def test_a_bfloat16_cache():
    text, rows = " ".join(page("docs/kernels.md").split()), lines(RUN)
    steps = [rows["attend_next", 1, tokens] for _, tokens in SHAPES]
    short, middle, long = (f"{row['us']:.1f}" for row in steps)
    shares = [round(100 * row["floor"] / row["us"]) for row in steps]
    assert f"Measured: {short}, {middle} and {long}, which is {shares[0]}, {shares[1]} and {shares[2]} %" in text


def test_what_a_mask_costs():
    text = " ".join(page("docs/kernels.md").split())
    rows = [row for row in results("cache-attention-h200.jsonl") if row.get("run") == RUN]
    masked, plain = (
        {
            row["kernel"]: row["us"]
            for row in rows
            if (row["batch"], row["tokens"]) == (1, 32768) and has == row.get("masked", True)
        }
        for has in (True, False)
    )
    cost = {name: f"{masked[name] - plain[name]:.1f} of {masked[name]:.1f}" for name in PACKED}
    assert f"{cost['mxint4']} us in MXINT4, {cost['mxint8']} in MXINT8 and {cost['mxint6']} in 6 bits" in text


def test_what_was_dropped():
    text = " ".join(page("docs/kernels.md").split())
    rows = [row for row in results("cache-attention-h200.jsonl") if row.get("run") == "mask of all rows"]
    rows = [row for row in rows if row["tokens"] == 32768 and row["kernel"] in PACKED]
    order = ("mxint4", "mxint8", "mxint6")
    few = {row["kernel"]: row["us"] for row in rows if "registers" in row}
    assert "{:.1f} us in MXINT4, {:.1f} in MXINT8 and {:.1f} in 6 bits".format(*map(few.get, order)) in text
    masked = {row["kernel"]: row["us"] for row in rows if row.get("default")}
    plain = {row["kernel"]: row["us"] for row in rows if not row.get("masked", True)}
    measured = *map(masked.get, order), *map(plain.get, order)
    said = "{:.1f}, {:.1f} and {:.1f}, more than before; {:.1f}, {:.1f} and {:.1f} without a mask."
    assert said.format(*measured) in text


def test_a_step_in_one_launch():
    text = " ".join(page("docs/kernels.md").split())
    rows = [row for row in results("cache-attention-h200.jsonl") if row.get("run") == "one launch"]
    us = {(row["launches"], row["parts_at_once"], row["tokens"]): row["us"] for row in rows}
    pairs = [(us[1, at_once, tokens], us[2, 32, tokens]) for tokens, at_once in ((32768, 33), (8192, 33), (2048, 17))]
    long, middle, short = (f"{new:.1f} in place of {old:.1f}" for new, old in pairs)
    assert f"Measured: {long} us, {middle} for 8192 and {short} for 2048" in text
    more, long, short = (f"{us[2, 33, tokens]:.1f}" for tokens in (32840, 32768, 2048))
    old = [us[2, 32, tokens] for tokens in (32840, 32768, 2048)]
    assert f"32840 tokens take {more} us in place of {old[0]:.1f} in MXINT8" in text
    assert f"but 32768 {long} in place of {old[1]:.1f} and 2048 {short} in place of {old[2]:.1f}" in text
    assert f"In one launch 32840 take {us[1, 33, 32840]:.1f}." in text
