"""Compare each number of mixtures of experts in docs/ with the record of its measurement in benchmarks/results."""

from records import page, percent, results

OURS = "mxcompile"


def test_the_experts_on_a_gpu():
    text = page("docs/benchmarks.md")
    names = {"Qwen3-30B-A3B": "qwen3-moe", "gpt-oss": "gpt-oss"}
    ours = {(r["shape"], r["tokens"], r["weight"]): r for r in results("experts-h200.jsonl") if r.get("path") == OURS}
    for name, shape in names.items():
        for weight in ("mxfp4", "mxint4"):
            lines = [ours[shape, tokens, weight] for tokens in (1, 32, 2048)]
            cells = " | ".join(f"{line['us']:.1f} us, {line['ratio']:.2f} x" for line in lines)
            assert f"| {name}, {weight} | {cells} |" in text
    shares = [line["floor_share"] for (_, tokens, _), line in ours.items() if tokens == 1]
    few = {shape: row for (shape, layout), row in one_token().items() if layout == "as it is"}
    for shape, pair, ends in (
        ("qwen3-moe", "Ui", "in Qwen3-30B-A3B's shape, {} of that speed"),
        ("gpt-oss", "Pj", "in gpt-oss', {}"),
    ):
        us, share = few[shape]["us"], percent(few[shape]["floor_us"] / few[shape]["us"][pair])
        assert f"{us[pair]:.1f} us in place of {us['Aa']:.1f} {ends.format(share)}" in " ".join(text.split())
    bare = {r["shape"]: r["us"] for r in results("experts-h200.jsonl") if r.get("path") == "two grouped_mm"}
    qwen, gpt_oss = (f"{bare[shape] / ours[shape, 2048, 'mxfp4']['us']:.2f}" for shape in names.values())
    assert f"take {qwen} and {gpt_oss} times as long as our whole layers" in text
    assert f"{percent(min(shares))} to {percent(max(shares))} of the speed" in text


def one_token():
    """Pairs of configs for one token, today's kernels among them, by shape and layout."""
    rows = results("experts-configs-h200.jsonl")
    return {(r["shape"], r["layout"]): r for r in rows if r.get("run") == "short addresses"}


def test_experts_of_one_token():
    text, runs = " ".join(page("docs/kernels.md").split()), one_token()
    qwen, gpt_oss = (runs[shape, "as it is"]["us"] for shape in ("qwen3-moe", "gpt-oss"))
    assert f"Measured: {qwen['Bc']:.1f} to {qwen['Ui']:.1f}, gpt-oss {gpt_oss['Aa']:.1f} to {gpt_oss['Pj']:.1f}" in text
    assert f"takes {gpt_oss['-j']:.1f} us in place of {gpt_oss['-a']:.1f}" in text
    floors = [runs[shape, "as it is"]["floor_us"] for shape in ("qwen3-moe", "gpt-oss")]
    shares = percent(floors[0] / qwen["Ui"]), percent(floors[1] / gpt_oss["Pj"])
    assert f"reach {shares[0]} of the floor's speed for Qwen3-30B-A3B and {shares[1]} for gpt-oss" in text
    assert f"55 % would be {floors[0] / 0.55:.1f} us for the first" in text
    assert f"takes {qwen['R2']:.1f} us in two dependent launches, {qwen['R1']:.1f} for the first weight" in text
    profile = next(r["kernels"] for r in results("experts-configs-h200.jsonl") if "profile" in r)
    used = [percent(profile[name]["issue_slots_used"]) for name in ("B", "U")]
    assert f"issue slots {used[0][:-2]} to {used[1]} are used" in text
    other, old = (runs["qwen3-moe", layout]["us"] for layout in ("two pieces", "as it is"))
    assert f"{other['Uc']:.1f} and {other['Bc']:.1f} us in place of {old['Bc']:.1f}" in text
    ordered = next(r["us"] for r in results("experts-configs-h200.jsonl") if r.get("run") == "in order")
    assert f'Measured (the run "in order"): {ordered["uc"]:.1f} in place of {ordered["Ui"]:.1f} at best' in text
    assert f"takes {ordered['w-']:.1f} us in place of {ordered['B-']:.1f}, but both then {ordered['wh']:.1f} to" in text


def test_a_model_of_experts_on_a_gpu():
    text, lines = page("docs/benchmarks.md"), results("experts-end-to-end-h200.jsonl")
    latest = {row["way"]: row for row in lines}
    ours, plain, grouped = (latest[way] for way in ("w4a16-mxfp-quick", "bfloat16", "bfloat16, grouped_mm"))
    for batch, baseline in (("batch_1", plain), ("batch_32", grouped)):
        for title, key in ((f"a token at batch {batch[6:]}, ms", "token_ms"), ("its kernels, ms", "step_ms")):
            slow, fast = baseline[batch][key], ours[batch][key]
            assert f"| {title} | {slow:.2f} | {fast:.2f} ({slow / fast:.2f} x) |" in text
    assert f"transformers' own choice, it takes {plain['batch_32']['token_ms']:.2f} ms" in text
    first, first_plain = (next(row for row in lines if row["way"] == way) for way in ("w4a16-mxfp-quick", "bfloat16"))
    assert f"{first['prefill_ms']:.1f} ms on a quiet host, compiled bfloat16 {first_plain['prefill_ms']:.1f}:" in text


def test_experts_of_one_token_in_one_launch():
    text = " ".join(page("docs/kernels.md").split())
    rows = [r for r in results("experts-configs-h200.jsonl") if (r.get("shape"), r.get("tokens")) == ("qwen3-moe", 1)]
    tried = next(r for r in rows if "M12" in r.get("us", {}))
    held, beside = (next(r for r in rows if r.get("timeline_of") == name) for name in ("M12", "M8"))
    once = min(us for name, us in tried["us"].items() if tried["configs"][name]["launches"] == 1)
    assert f"Measured: {once:.1f} at best, where two launches took {tried['us']['Bd']:.1f} in the same run" in text
    together = [us for name, us in tried["us"].items() if name.startswith("B128")]
    assert f"two launches took {min(together):.2f} to {max(together):.2f} us" in text
    first, _, last = held["gated_stored"]
    assert f"the last gated value from {last:.1f} to {beside['gated_stored'][2]:.1f} us" in text
    assert f"takes {held['sum_stored'][1] - held['sum_saw_counter'][1]:.1f} us after its wait" in text
    assert f"it takes {held['counted'][1] - held['gated_stored'][1]:.1f} us, the wait" in text
    choices = held["gated_stored_by_choice"]
    assert f"is over {held['waited'][1]:.2f} us after" in text
    assert f"choices are read after {held['choices_read'][1]:.2f}, the gated values stored" in text
    assert f"after {first:.2f} to {last:.2f}, those of the first choice after {choices[0]:.1f}" in text
    assert f"of the seventh after {choices[6]:.1f}" in text


def test_other_projects_experts_on_a_gpu():
    lines = [row for row in results("experts-peers-h200.jsonl") if row.get("weight") == "mxfp4" and "times_ours" in row]
    text = page("docs/benchmarks.md")
    for path in dict.fromkeys(row["path"] for row in lines):
        times = {row["tokens"]: f"{row['times_ours']:.2f} x" for row in lines if row["path"] == path}
        assert (
            f"| {path} | {' | '.join(times.get(tokens, '') for tokens in (1, 32, 2048))} |".replace("  ", " ") in text
        )
