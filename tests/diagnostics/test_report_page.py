"""The report page in a real browser: all parts are drawn, links work, nothing is fetched, and there are no errors.

Skipped where there is no Chromium.
"""

import re
import shutil
from contextlib import contextmanager

import pytest
import torch
from models import build, inputs, llama
from reports import HOSTILE, ROUND, TEXT, Hostile, dump, fail

import mxcompile
from mxcompile.diagnostics.dump import Dump
from mxcompile.diagnostics.report.study_page import write_study_page
from mxcompile.errors import PassError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
api = pytest.importorskip("playwright.sync_api", reason="install the test extra")
expect = api.expect
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
MORE_FLAGS = ("disable-component-update", "disable-sync")
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        arguments = [f"--{flag}" for flag in (*FLAGS, *MORE_FLAGS)]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 12 layers with 7 matmuls each, after 3 passes."""
    path = tmp_path_factory.mktemp("dump")
    dump(path, llama(12), inputs("llama"))
    return path


@contextmanager
def opened(browser, folder, **options):
    """The page of a dump; afterwards, that there were no errors, no requests and no page wider than the screen."""
    found: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.on("console", lambda message: found.append(message.text))
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on("dialog", lambda dialog: found.append(dialog.message))
        page.on("request", lambda request: found.append(request.url))
        page.goto((folder / "index.html").as_uri())
        yield page
        assert found == [(folder / "index.html").as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def cell(page, number, module):
    """The cell of a module's weight in the heat map of a pass, from 1."""
    figure = page.locator("#maps figure").nth(number - 1)
    return figure.get_by_role("link", name=f"{module}.weight,")


def label(page, number, module):
    return cell(page, number, module).locator("rect").get_attribute("aria-label")


QUERY, NODES = "#query", "#nodes tr"


def test_it_shows_every_layer_after_every_pass(browser, folder):
    with opened(browser, folder) as page:
        assert page.locator("#maps figure").count() == 3
        assert page.locator("#maps a").count() == 3 * 84
        found = mxcompile.Ledger.load(folder).passes[1].measured.layers["model.layers.5.mlp.up_proj.weight"]
        assert (
            label(page, 2, "model.layers.5.mlp.up_proj")
            == f"model.layers.5.mlp.up_proj.weight, 2 round-weights: {found.local_db:.1f} dB"
        )


def test_the_worst_layer_is_shown_until_another_is_chosen(browser, folder):
    worst = mxcompile.Ledger.load(folder).worst(1)[0]
    with opened(browser, folder) as page:
        title = page.locator("#layer-title")
        assert title.inner_text() == worst
        cell(page, 2, "model.layers.7.self_attn.k_proj").click()
        expect(title).to_have_text("model.layers.7.self_attn.k_proj.weight")
        assert page.locator("#layer .distribution svg").count() == 2
        assert page.locator("#layer .tabs [aria-current]").inner_text() == "2 round-weights"
        assert "weight mxint4, input float after 2 round-weights" in page.locator("#layer").inner_text()
        page.get_by_role("link", name="3 lower-mx", exact=True).click()
        expect(page.locator("#layer")).to_contain_text("weight mxint4, input mxint8 after 3 lower-mx")
        assert "zeros → " in page.locator("#layer .distribution").nth(1).inner_text()
        page.go_back()
        expect(page.locator("#layer .tabs [aria-current]")).to_have_text("2 round-weights")


def test_the_numbers_shown_are_those_chosen(browser, folder):
    layers = mxcompile.Ledger.load(folder).passes[2].measured.layers
    with opened(browser, folder) as page:
        for choice, field in (("weight", "weight_db"), ("output, accumulated", "accumulated_db")):
            page.get_by_label(choice, exact=True).check()
            value = getattr(layers["model.layers.9.mlp.down_proj.weight"], field)
            assert label(page, 3, "model.layers.9.mlp.down_proj").endswith(f": {value:.1f} dB")
        page.get_by_label("weight", exact=True).check()
        assert label(page, 1, "model.layers.9.mlp.down_proj").endswith(": not measured")


def test_arrow_keys_walk_through_the_heat_map(browser, folder):
    with opened(browser, folder) as page:
        cell(page, 3, "model.layers.0.self_attn.q_proj").focus()
        for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowLeft"):
            page.keyboard.press(key)
        page.keyboard.press("Enter")
        expect(page.locator("#layer-title")).to_have_text("model.layers.1.self_attn.q_proj.weight")
        assert page.locator("#maps a[tabindex='0']").count() == 3


def test_a_layer_leads_to_its_nodes_and_to_its_changes(browser, folder):
    with opened(browser, folder) as page:
        cell(page, 3, "model.layers.11.mlp.up_proj").click()
        page.get_by_role("link", name="Nodes in the graph").click()
        expect(page.locator(QUERY)).to_have_value("model.layers.11.mlp.up_proj")
        rows = [row.split("\t") for row in page.locator(NODES).all_inner_texts()]
        assert [row[1] for row in rows] == ["tensor", "tensor", "mx.dequantize", "aten.linear"]
        assert rows[2][2:6] == ["f32", "[128, 64]", "mxint4", "model.layers.11.mlp.up_proj"]
        page.get_by_role("link", name="Changes by lower-mx").click()
        diff = page.locator("#pass-3 .diff")
        expect(diff).to_contain_text("Lines of modules that match model.layers.11.mlp.up_proj")
        expect(diff.locator(".d2h-file-side-diff")).to_have_count(2)
        removed, added = (side.inner_text() for side in diff.locator(".d2h-file-side-diff").all())
        assert "%model_layers_11_mlp_up_proj_weight  f32[128, 64]" in removed
        assert "%model_layers_11_mlp_up_proj_weight_elements" in added
        assert "layers_10" not in removed + added


def test_a_whole_diff_is_drawn_when_it_is_opened(browser, folder):
    with opened(browser, folder) as page:
        assert page.locator(".d2h-wrapper").count() == 0
        page.locator("#overview").get_by_role("link", name="round-weights").click()
        lines = page.locator("#pass-2 .d2h-code-side-line")
        expect(lines.filter(has_text="format=mxint4")).to_have_count(84)


def test_search_by_module_path(browser, folder):
    with opened(browser, folder) as page:
        page.locator(QUERY).fill("*.down_proj")
        assert page.locator("#maps a:not(.aside)").count() == 3 * 12
        assert "12 layers" in page.locator("#matches").inner_text()
        page.locator(QUERY).fill("model.layers.1")
        assert page.locator("#maps a:not(.aside)").count() == 3 * 7  # none of layers 10 and 11
        page.keyboard.press("Enter")
        expect(page).to_have_url(re.compile("#graph$"))
        assert all(".1" in text for text in page.locator(f"{NODES} td:nth-child(6)").all_inner_texts())
        page.locator("#op").select_option("mx.quantize")
        assert page.locator(NODES).count() == 4
        page.locator("#stage").select_option("00-trace")
        assert not [text for text in page.locator(NODES).all_inner_texts() if "mx." in text]
        page.locator(QUERY).fill("nowhere")
        assert "0 layers" in page.locator("#matches").inner_text()
        assert page.locator(NODES).count() == 0


def test_all_nodes_can_be_seen(browser, folder):
    lines = (folder / "03-lower-mx.txt").read_text().count("\n")
    with opened(browser, folder) as page:
        assert page.locator(NODES).count() == 200
        while page.locator("#more").is_visible():
            page.locator("#more").click()
        assert page.locator(NODES).count() == lines


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser, folder, scheme):
    with opened(browser, folder, color_scheme=scheme, **PHONE) as page:
        cell(page, 2, "model.layers.0.mlp.up_proj").tap()
        page.locator("#pass-3 summary").tap()
        expect(page.locator("#pass-3 .d2h-file-diff")).to_have_count(1)
        ground, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert (brightness(ground) > brightness(ink)) == (scheme == "light")


def brightness(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3]))


def test_print_is_light_and_has_the_heat_map(browser, folder):
    with opened(browser, folder, color_scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("#maps figure").nth(2).is_visible()
        assert not page.locator(QUERY).is_visible()
        assert page.pdf().startswith(b"%PDF")


def test_hostile_names(browser, tmp_path):
    dump(tmp_path, Hostile(), torch.randn(4, 64))
    with opened(browser, tmp_path) as page:
        for name in HOSTILE:
            cell(page, 3, name).click()
            expect(page.locator("#layer-title")).to_have_text(f"{name}.weight")
            page.get_by_role("link", name="Nodes in the graph").click()
            expect(page.locator(NODES).first).to_contain_text(name)
            page.get_by_role("link", name="Changes by lower-mx").click()
            expect(page.locator("#pass-3 .diff")).to_contain_text(f"# {name}")
        assert page.locator("main img, main script").count() == 0


def test_a_diagnosis(browser, tmp_path):
    dump(tmp_path, llama(2), inputs("llama"), "diagnose", ROUND)
    with opened(browser, tmp_path) as page:
        assert page.locator("#profiles svg").count() == 3
        assert page.locator("#profiles svg").first.locator("circle").count() == 8
        assert page.locator("#diagnosis tbody tr").count() == 8
        cell(page, 2, "model.layers.1.mlp.up_proj").click()
        expect(page.locator("#layer .diagnosed")).to_contain_text("Diagnosis of the input: channel ratio")


def test_training(browser, tmp_path):
    batches = [inputs("llama", 2, 16, seed=seed) for seed in range(4)]
    program = mxcompile.trace(llama(1), batches[0])
    text = f"{ROUND} | distill{{train=weights,steps=8}} | tune-vectors{{steps=4}}"
    mxcompile.Pipeline.parse(text).run(program, batches, instruments=[Dump(tmp_path), mxcompile.Measure()])
    with opened(browser, tmp_path) as page:
        assert page.locator("#curves figcaption").all_inner_texts() == [
            "2 distill: all weights",
            "3 tune-vectors: all vectors",
        ]
        held_out = page.locator("#curves svg").first.locator("circle")
        assert held_out.count() == 9
        loss = mxcompile.Ledger.load(tmp_path).passes[1].curves["all weights"].held_out[0][1]
        label = held_out.first.get_attribute("aria-label")
        assert label.startswith("2 distill: all weights, step 0: ")
        assert float(label.rpartition(" ")[2]) == pytest.approx(loss, rel=1e-3)


def test_a_cache(browser, tmp_path):
    dump(tmp_path, llama(2), inputs("llama"), "quantize-cache{value=mxint4}", ROUND)
    numbers = mxcompile.Ledger.load(tmp_path).passes[0].numbers["model.layers.1.self_attn"]
    with opened(browser, tmp_path) as page:
        found = page.locator("#maps figure").nth(1).get_by_role("link", name="model.layers.1.self_attn.cached_values,")
        assert found.locator("rect").get_attribute("aria-label").endswith(f": {numbers['value_sqnr_db']:.1f} dB")
        found.click()
        expect(page.locator("#layer-title")).to_have_text("model.layers.1.self_attn.cached_values")
        expect(page.locator("#layer")).to_contain_text("rounded by quantize-cache{value=mxint4} after 2 round-weights")
        expect(page.locator("#layer")).to_contain_text("No histograms: a cache has none.")
        page.get_by_label("output, accumulated", exact=True).check()
        assert found.locator("rect").get_attribute("aria-label").endswith(": not measured")


def test_a_study(browser, tmp_path):
    cells = [
        {"label": f"{name} {HOSTILE[0]}", "bytes": size, "kl": kl, "perplexity": 9.0, "top1": 0.5, "front": name == "a"}
        | {"calibration": "", "difference": "best", "clear": True}
        for name, size, kl in (("a", 1e6, 0.1), ("b", 2e6, 4.0))
    ]
    write_study_page(tmp_path, {"name": "s", "groups": [{"title": "m", "float": 8.0, "cells": cells}]})
    with opened(browser, tmp_path) as page:
        assert page.locator("figure.front circle").count() == 2
        assert page.locator("tbody tr").count() == 2
        assert page.locator("tbody th").first.inner_text() == f"a {HOSTILE[0]}"


def test_runs_that_are_not_whole(browser, tmp_path):
    with pytest.raises(PassError):
        dump(tmp_path / "failed", build("mlp"), inputs("mlp"), ROUND, fail)
    with opened(browser, tmp_path / "failed") as page:
        assert "no fuel in <img src=x onerror=alert(1)>" in page.get_by_role("alert").inner_text()
        assert page.locator("#maps figure").count() == 1
    mxcompile.quantize_and_compile(
        build("mlp"), inputs("mlp"), recipe=TEXT, dump=tmp_path / "b", probe=False, compile=False
    )
    with opened(browser, tmp_path / "b") as page:
        assert "the layers were not measured" in page.locator("#layers").inner_text()
        page.locator("#pass-3 summary").click()
        expect(page.locator("#pass-3 .d2h-wrapper")).to_have_count(1)
        page.locator(QUERY).fill("up")
        assert page.locator(NODES).count() == 9
