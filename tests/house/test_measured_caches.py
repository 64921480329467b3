"""Compare what the docs say about key/value caches with the records of the measurements."""

from records import page, results

FLOAT = "key=none,value=none"


def test_the_table_of_key_value_caches():
    """A row for every cache but the float one; a dash where a length was not measured."""
    text, records = page("docs/accuracy.md"), results("cache.jsonl")
    lengths = sorted({row["context"] for row in records})
    kl = {(row["cache"], row["context"]): row["kl"] for row in records}
    needles = {row["cache"]: row["needles"] for row in records if row["context"] == lengths[-1]}
    assert all(kl[FLOAT, length] == 0 for length in lengths)
    for row in records:
        name = row["cache"]
        values = [f"{kl[name, length]:.4f}" if (name, length) in kl else "-" for length in lengths]
        line = f"| `{name}` | {row['bytes']:,} | {' | '.join(values)} | {needles.get(name, '-')} |"
        assert (line in text) != (name == FLOAT)


def test_what_caches_lose():
    text, records = page("docs/accuracy.md"), results("cache.jsonl")
    kl = {(row["cache"], row["context"]): row["kl"] for row in records}
    mxint4 = kl["mxint4", 512]
    windows = [kl[f"key={fmt},value={fmt},window=32,rotate=head+values", 512] for fmt in ("mxfp4", "mxint4")]
    assert f"32 exact tokens lose {windows[0]:.3f} (MXFP4) to {windows[1]:.3f} (MXINT4)" in text
    assert f"which is {mxint4 / windows[1]:.0f} times less than MXINT4 alone" in text
    assert round(kl["key=mxfp8,value=mxfp8", 512] / kl["mxint8", 512]) == 9  # "a ninth"
    assert round(kl["key=mxint4,value=none", 512] / kl["key=none,value=mxint4", 512]) == 9  # "nine times the damage"
    rows = [kl["mxint8", length] for length in (512, 2048, 8192)]
    assert f"It loses {min(rows):.4f} to {max(rows):.4f} nats at 512 to 8192 tokens" in text
    assert f"FP8 with one scale {kl['fp8, one scale', 2048] / kl['mxint8', 2048]:.0f} times as much at 2048" in text


def test_what_caches_lose_in_long_texts():
    text, records = page("docs/accuracy.md"), results("cache.jsonl")
    kl = {(row["cache"], row["context"]): row["kl"] for row in records}
    small = "key=mxint4,value=mxint4,window={},rotate=head+values"
    assert f"at 2048 tokens they lose {kl[small.format(32), 2048]:.3f} (MXINT4)" in text
    assert (
        f"at 8192 tokens {kl[small.format(32), 8192]:.3f}, with 128 exact tokens {kl[small.format(128), 8192]:.3f}"
        in text
    )
    short, long = (kl["key=mxfp8,value=mxfp8", length] for length in (512, 8192))
    assert f"MXFP8 {short:.3f} at 512 tokens and {long:.3f} at 8192" in text
    found = {row["cache"]: row["needles"] for row in records if row["context"] == 8192}
    assert (found[FLOAT], found["mxint4"]) == ("2/4", "0/4")
    assert {name for name, count in found.items() if count == "1/4"} == {small.format(32), small.format(128)}


def test_caches_behind_rounded_weights():
    text, records = page("docs/accuracy.md"), results("cache-recipes.jsonl")
    kl = {(row["recipe"], row["cache"], row["context"]): row["kl"] for row in records}
    for recipe, cache, _ in kl:
        values = [kl.get((recipe, cache, length)) for length in (512, 2048, 8192)]
        cells = " | ".join("-" if value is None else f"{value:.3f}" for value in values)
        assert f"| `{recipe}` | `{cache}` | {cells} |" in text
    for length in (512, 2048, 8192):
        plain = kl["w4a8-mxint-quick", FLOAT, length]
        assert 0 < kl["w4a8-mxint-quick", "mxint8", length] - plain < 0.0011
        rotated = kl["w4a8-mxint-quick", "key=mxint8,value=mxint4,window=32+values", length]
        assert 0.07 < rotated - plain < 0.09
    base = kl["w4a8-mxint-quick", FLOAT, 2048]
    caches = ("key=mxint8,value=mxint4,window=32", "key=mxint4,value=mxint4,window=32,rotate=head")
    added = [kl["w4a8-mxint-quick", name, 2048] - base for name in caches]
    assert f"32 exact tokens add {added[0]:.3f} to W4A8 with values in MXINT4, and {added[1]:.3f} with keys" in text
    assert kl["w4a4-mxfp-quick", "mxint8", 2048] < kl["w4a4-mxfp-quick", FLOAT, 2048]


def test_caches_behind_recipes_that_calibrate():
    text, records = " ".join(page("docs/accuracy.md").split()), results("cache-recipes.jsonl")
    kl = {(row["recipe"], row["cache"]): row["kl"] for row in records if row["context"] == 2048}
    cached = "w4a8-mxint-kv4"
    assert abs(kl[cached, FLOAT] - kl["w4a8-mxint", FLOAT]) < 0.001
    four = kl[cached, "key=mxint4,value=mxint4,window=32,rotate=head"] - kl[cached, FLOAT]
    eight = [kl[recipe, "mxint8"] - kl[recipe, FLOAT] for recipe in ("w4a8-mxint", "w4a4-mxfp")]
    assert f"4 bits then add {four:.3f} to W4A8, and MXINT8 {eight[0]:.3f} to it and {eight[1]:.3f} to W4A4" in text


def decode_rows():
    """Those of 2048 tokens and of short prompts in long caches; those of 32768 tokens that are held, but not of earlier
    kernels."""
    rows = [row for row in results("cache-decode-h200.jsonl") if "run" not in row]
    held = {row["cache"]: row for row in rows if row.get("rounds")}
    return {(row["cache"], row["context"]): row for row in rows if not row.get("rounds")}, held


def test_a_whole_model_with_a_cache():
    text, (rows, held) = " ".join(page("docs/kernels.md").split()), decode_rows()
    same = [rows[name, 2048]["same"] for name in ("mxint8", "mxint4", FLOAT)]
    assert f"{same[0]} (MXINT8) and {same[1]} (MXINT4) of 128 tokens" in text
    assert f"model, {same[2]} with the float cache" in text
    assert f"ties within {max(row.get('off', 0) for row in rows.values()):.2f} standard deviations" in text
    short = [rows[name, 2048]["token_ms"] for name in (FLOAT, "mxint8", "mxint4")]
    assert f"{short[0]:.2f} ms with the float cache, {short[1]:.2f} in MXINT8 and {short[2]:.2f} in MXINT4" in text
    assert f"{short[0] / short[1]:.2f} and {short[0] / short[2]:.2f} times as fast. With **32768" in text
    long = [held[name]["token_ms"] for name in (FLOAT, "mxint8", "mxint4")]
    assert f"{long[0]:.3f} ms with the float cache, {long[1]:.3f} in MXINT8 and {long[2]:.3f} in MXINT4" in text
    assert f"{long[0] / long[1]:.2f} and {long[0] / long[2]:.2f} times as fast. 0.24 ms" in text
    head = 0.24
    deep = [head + (ms - head) / held[FLOAT]["layers"] * 32 for ms in long]
    assert f"32 layers the ratios would be {deep[0] / deep[1]:.2f} and {deep[0] / deep[2]:.2f}" in text
    before = {row["cache"]: row["token_ms"] for row in results("cache-decode-h200.jsonl") if "run" in row}
    old = [before[name] for name in (FLOAT, "mxint8", "mxint4")]
    assert f"it took {old[0]:.3f}, {old[1]:.3f} and {old[2]:.3f} ms" in text
    gains = [(ms[0] - other) / held[FLOAT]["layers"] * 1e3 for ms in (old, long) for other in ms[1:]]
    assert f"{gains[0]:.1f} and {gains[1]:.1f} us a layer less" in text
    assert f"now {gains[2]:.1f} and {gains[3]:.1f}" in text


def test_prompts_with_a_cache():
    text, (rows, held) = " ".join(page("docs/kernels.md").split()), decode_rows()
    prompt = {key: row["prompt_ms"] for key, row in rows.items()}
    short = [prompt[name, 2048] for name in (FLOAT, "mxint8", "mxint4")]
    assert f"took {short[0]:.0f} ms with the float cache, {short[1]:.0f} with MXINT8 and {short[2]:.0f} with" in text
    assert (
        f"{prompt['mxint8', 32768]:.1f} ms with MXINT8 and {prompt['mxint4', 32768]:.1f} with MXINT4 in caches" in text
    )
    assert f"the float cache takes {prompt[FLOAT, 32768]:.0f} ms" in text
    long = [held[name]["prompt_ms"] for name in (FLOAT, "mxint8", "mxint4")]
    assert f"takes {long[0]:.0f} ms with the float cache, {long[1]:.0f} in MXINT8 and {long[2]:.0f} in MXINT4" in text


def test_caches_beside_those_of_transformers():
    text = page("docs/accuracy.md")
    for row in results("cache-peers.jsonl"):
        name = "`fp8` of transformers 5.24" if row["cache"] == "fp8" else f"`{row['cache']}`"
        assert f"| {name} | {row['bits']:g} | {row['kl']:.4f} |" in text


def test_tokens_a_second_on_a_cpu():
    text = page("docs/benchmarks.md")
    rows = {(row["cache"], row["context"]): row for row in results("cache-decode-cpu.jsonl")}
    for (name, length), row in rows.items():
        ratio = rows[FLOAT, length]["token_ms"] / row["token_ms"]
        cache = "float" if name == FLOAT else f"`{name}`"
        cells = f"{row['cache_bytes'] / 1e6:.0f} | {1e3 / row['token_ms']:.1f} | {ratio:.2f}x"
        assert f"| {length} | {cache} | {cells} |" in text
