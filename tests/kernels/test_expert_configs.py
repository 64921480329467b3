"""expert_configs.py: configs that the kernels take, and what they compile to for Hopper, without a GPU."""

from itertools import product

import pytest
import torch

from mxcompile.formats import FORMATS, MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT4, MXFormat, activation_rule
from mxcompile.kernels.layout.planes import PlanarWeight, padded_bytes
from mxcompile.numerics.gates import Gate

pytest.importorskip("triton")

CPU = torch.device("cpu")
GPT_OSS = Gate(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)
SIZES = (1, 128, 130, 768, 2048, 2880, 14336)


def powers_of_two(*numbers: int) -> bool:
    return all(number > 0 and number & (number - 1) == 0 for number in numbers)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_any_shape_has_a_config(fmt: MXFormat) -> None:
    from mxcompile.kernels.expert_configs import grouped_config, sum_config

    for size, each, shared, block in product(SIZES, (0.1, 2, 32), (False, True), (1, 16, 32, 64, 128)):
        config = grouped_config(fmt, size, each, CPU, shared=shared, block=block)
        assert powers_of_two(config.choices, config.out, config.slices)
        assert (config.choices > 1) == shared
        assert config.out % (2 * block) == 0
        assert not config.dependent
    for size, slots in product(SIZES, (0, 1, 2, 3, 6, 8, 10, 64)):
        config = sum_config(fmt, size, slots, CPU)
        assert powers_of_two(config.out, config.slices, config.parts)
        assert config.slices % config.parts == 0


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_one_token_has_configs_that_fit(fmt: MXFormat) -> None:
    """Only for 4 bits; every choice has a slice, and what is decoded ahead is all of it."""
    from mxcompile.kernels.expert_configs import one_token_configs
    from mxcompile.kernels.layout.planes import plane_layout

    layout = plane_layout(fmt)
    served = 0
    for hidden, inner, slots in product(SIZES, SIZES, (1, 2, 3, 4, 6, 8, 10, 64)):
        configs = one_token_configs((fmt, fmt), (hidden, inner), slots, CPU)
        if configs is None:
            continue
        served += 1
        up, down = configs
        assert powers_of_two(up.out, up.slices, down.out, down.slices, down.parts)
        assert down.slices % down.parts == 0
        assert slots * down.parts <= down.slices
        assert down.held > 0
        assert not down.decoded or down.held * down.parts * down.halves >= -(-inner // layout.columns)
    assert (served > 0) == ((layout.words, layout.planes) == (1, 4))
    assert one_token_configs((fmt, MXFP6_E2M3), (2048, 768), 8, CPU) is None


@pytest.mark.parametrize(
    ("hidden", "inner", "slots", "gate"),
    [
        (2048, 768, 8, Gate()),
        (2880, 2880, 4, GPT_OSS),
        pytest.param(2048, 768, 10, Gate(), marks=pytest.mark.slow),
    ],
)
def test_one_token_spills_nothing(hidden: int, inner: int, slots: int, gate: Gate) -> None:
    """Held weights go from memory to registers and stay in their threads; x alone goes through shared memory."""
    from sass import grouped_report, sum_report

    from mxcompile.kernels.expert_configs import one_token_configs

    configs = one_token_configs((MXFP4, MXFP4), (hidden, inner), slots, CPU)
    assert configs is not None
    reports = (
        grouped_report(empty(MXFP4, 2 * inner, hidden), configs[0], gate, has_bias=gate.interleaved),
        sum_report(empty(MXFP4, hidden, inner), configs[1], gate.interleaved),
    )
    for report, config in zip(reports, configs, strict=True):
        assert report.spilled_bytes == 0
        assert "HMMA" in report.sass
        assert ("LDGSTS" in report.sass) == (config.held == 0)
        if config.held:
            assert "LDG.E.EF.128" in report.sass
            assert report.sass.count("SHFL") < 24


def empty(fmt: MXFormat, out: int, size: int) -> PlanarWeight:
    """A planar weight without memory."""
    from mxcompile.kernels.layout.planes import PlanarScaling, from_bytes

    elements, scales = (torch.empty(out, n, dtype=torch.uint8, device="meta") for n in padded_bytes(fmt, size))
    return from_bytes(elements, scales, fmt, size, PlanarScaling(0, 0))


@pytest.mark.parametrize(
    ("fmt", "sizes", "gate", "each"),
    [
        (MXFP4, (2048, 768), Gate(), None),
        (MXINT4, (2880, 2880), GPT_OSS, None),
        (MXFP4, (2048, 768), Gate(), 2.0),
        pytest.param(MXFP4, (2880, 2880), GPT_OSS, 12.0, marks=pytest.mark.slow),
        pytest.param(MXFP6_E2M3, (2048, 768), Gate("gelu"), None, marks=pytest.mark.slow),
        pytest.param(MXFP6_E2M3, (2048, 768), Gate("gelu"), 2.0, marks=pytest.mark.slow),
        pytest.param(MXFP8_E4M3, (2048, 768), Gate("relu"), 2.0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loads_overlap_and_nothing_spills(
    fmt: MXFormat, sizes: tuple[int, int], gate: Gate, each: float | None
) -> None:
    """In the loop, weight and x go to shared memory asynchronously, and values from there to the tensor core without
    another conversion; one for the scales is in order."""
    from sass import SHARED_BYTES, grouped_report, sum_report

    from mxcompile.kernels.expert_configs import grouped_config, sum_config

    (hidden, inner), shared = sizes, each is not None
    up, down = empty(fmt, 2 * inner, hidden), empty(fmt, hidden, inner)
    rounding = (MXFP8_E4M3, activation_rule(MXFP8_E4M3))
    config, last = (grouped_config(fmt, size, each or 0.1, CPU, shared=shared, block=32) for size in sizes)
    reports = [grouped_report(up, config, gate, rounding, has_bias=gate.interleaved)]
    if shared:
        reports.append(grouped_report(down, last, None))
    else:
        reports.append(sum_report(down, sum_config(fmt, inner, 4 if gate.interleaved else 8, CPU)))
    for report in reports:
        assert report.count("HMMA") > 0
        assert report.count("LDGSTS") > 0
        assert report.count(" STS") <= 1
        assert report.count("SHFL") == 0
        assert report.spilled_bytes == 0
        assert report.shared_bytes <= SHARED_BYTES // 2
