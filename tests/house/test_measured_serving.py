"""Compare what the pages on serving and on large models say of vLLM, and of two GPUs, with their records."""

from typing import Any

from records import page, results


def test_the_steps_of_served_models():
    """Kernels of the run that profiled Marlin; of whole steps the latest of each variant."""
    text, lines = page("docs/serving.md"), results("serving-h200.jsonl")
    latest = {row["variant"]: row for row in lines}
    profiled = {row["variant"]: row["kernel_us"] for row in lines if "kernel_us" in row}
    names = {"mxfp4": "mxcompile, MXFP4 weight-only", "w4a8": "mxcompile, MXINT4 weights, MXINT8 activations"}
    names |= {"bf16": "bfloat16", "marlin": "compressed-tensors MXFP4, vLLM's Marlin (weight-only)"}
    for variant, name in names.items():
        times = [*latest[variant]["step_ms"].values(), latest[variant]["prompt_ms"]]
        assert f"| {name} | {' | '.join(f'{ms:.2f}' for ms in times)} |" in text
        if variant not in profiled:
            continue
        cells: list[str] = []
        for case in ("1", "8", "32", "prompt"):
            us, marlin = profiled[variant][case]["all"], profiled["marlin"][case]["all"]
            cells.append(f"{us:.0f}" + ("" if variant == "marlin" else f" ({marlin / us:.2f} x)"))
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_models_on_two_gpus():
    """vLLM with tensor parallel 2, and a model that is larger than a GPU, quantized from files."""
    text = page("docs/serving.md")
    names = {"bf16": "bfloat16", "marlin": "compressed-tensors MXFP4, vLLM's Marlin (weight-only)"}
    names |= {"mxfp4": "mxcompile, MXFP4 weight-only", "w4a8": "mxcompile, MXINT4 weights, MXINT8 activations"}
    eight = {row["variant"]: row for row in results("serving-two-h200.jsonl")}
    for variant, row in eight.items():
        times = [*row["step_ms"].values(), row["prompt_ms"]]
        assert f"| {names[variant]} | {' | '.join(f'{ms:.2f}' for ms in times)} |" in text
    parts = results("llama-70b-h200.jsonl")
    ours, floats = (row for row in parts if row["what"] == "serve")
    assert f"| bfloat16 | {cells(floats)} |" in text
    assert f"| mxcompile, MXFP4 weight-only | {cells(ours, floats)} |" in text
    (seventy,) = [row for row in parts if row["what"] == "compare"]
    assert (
        f"8B bfloat16 {distances(eight['bf16'])}, MXFP4 {distances(eight['mxfp4'])}, W4A8 {distances(eight['w4a8'])}; "
        f"70B MXFP4 {distances(seventy)}."
    ) in text
    text = page("docs/large_models.md")
    one, two = (row for row in parts if row["what"] == "gptq")
    gib = [row["device MB"] * 1e6 / 2**30 for row in (one, two)]
    assert f"took {one['seconds']} s from files with at most {gib[0]:.0f} GiB" in text
    assert f"took {two['seconds']} s in two processes on two H200s, with at most {gib[1]:.0f} GiB" in text
    (files,) = [row for row in parts if row["what"] == "quantize"]
    size, seconds = files["source bytes"] / 1e9, files["seconds"]
    sizes = f"{size:.0f} GB in Llama-3-70B's shape took {seconds:.0f} s with sixteen workers"
    assert f"{sizes} and {files['device peak bytes'] / 2**30:.1f} GiB" in text


def cells(row: dict[str, Any], baseline: dict[str, Any] | None = None) -> str:
    """A step at each batch size and a prompt, with how many times as fast as the baseline."""
    times = [f"{ms:.2f}" for ms in row["step_ms"].values()] + [f"{row['prompt_ms']:.0f}"]
    if baseline is not None:
        ms = [*row["step_ms"].values(), row["prompt_ms"]]
        floats = [*baseline["step_ms"].values(), baseline["prompt_ms"]]
        times = [f"{cell} ({theirs / own:.2f} x)" for cell, own, theirs in zip(times, ms, floats, strict=True)]
    return " | ".join(times)


def distances(row: dict[str, Any]) -> str:
    return f"{row['distance']:.3f} ({row['own_distance']:.3f})".replace("0.", ".")


def test_two_processes_serve_what_one_loads():
    text, rows = page("docs/serving.md"), results("serving-cpu.jsonl")
    floats, ours, one_head = ((f"{row['distance']:.4f}"[1:], f"{row['own_distance']:.4f}"[1:]) for row in rows)
    assert f"of W4A8 are {ours[0]} from those of transformers, whose own two attentions differ by {ours[1]}" in text
    assert f"of the bfloat16 model {floats[0]} and {floats[1]}." in text
    assert f"MXFP4 weights are {one_head[0]} from transformers, whose attentions differ by {one_head[1]}." in text
