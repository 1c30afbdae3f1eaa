"""The report in a real browser: what a person sees, and that nothing else happens."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from browser import LAPTOP, PHONE, Opened, chromium, opened
from lazarus.render.activation import page as report
from lazarus.render.base import assets
from lazarus.results import ActivationDiffRecord
from made_records import HOSTILE, cka_record, divergences, record_of, whole_record

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

BLUE, SKY = (0, 114, 178), (86, 180, 233)
VIRIDIS_ENDS = ((68, 1, 84), (253, 231, 37))
N_PROMPTS, N_LAYERS = 60, 6


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def record() -> ActivationDiffRecord:
    return whole_record(N_PROMPTS, N_LAYERS)


@pytest.fixture(scope="module")
def file(record: ActivationDiffRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(record, tmp_path_factory.mktemp("report"))


@pytest.fixture
def view(browser: Browser, file: Path) -> Iterator[Opened]:
    with opened(browser, file) as found:
        ready(found.page)
        yield found


@pytest.fixture
def page(view: Opened) -> Page:
    """The page with its prompts in the order of the result."""
    order(view.page, "given")
    return view.page


def saved(record: ActivationDiffRecord, folder: Path) -> Path:
    path = folder / "report.html"
    with path.open("wb") as stream:
        report.write_html(record, stream)
    return path


def ready(page: Page) -> None:
    page.wait_for_selector("html[data-ready]", state="attached")


def order(page: Page, by: str) -> None:
    page.locator("#prompts-explorer [data-part=sort]").select_option(by)


def draw(page: Page, plot: str) -> None:
    page.locator(plot).scroll_into_view_if_needed()
    page.wait_for_selector(f"{plot}[data-drawn]")


def colours(page: Page, selector: str) -> set[tuple[int, ...]]:
    from PIL import Image

    shot = Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")
    return {
        found[1] for found in shot.getcolors(shot.width * shot.height) or [] if isinstance(found[1], tuple)
    }


def near(found: set[tuple[int, ...]], wanted: tuple[int, ...], tolerance: int = 8) -> bool:
    return any(max(abs(a - b) for a, b in zip(colour, wanted, strict=True)) <= tolerance for colour in found)


def pixel(page: Page, selector: str, x: int, y: int) -> tuple[int, ...]:
    from PIL import Image

    shot = Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")
    found = shot.getpixel((x % shot.width, y))
    assert isinstance(found, tuple)
    return found


def first_rows(page: Page, explorer: str = "#prompts-explorer") -> list[int]:
    cells = page.locator(f"{explorer} [data-part=table] tbody tr td:nth-child(2)")
    return [int(text) for text in cells.all_text_contents()]


def test_nothing_is_asked_of_a_network_and_nothing_is_said(view: Opened, file: Path) -> None:
    page = view.page
    for plot in ("#curve", "#local", "#groups-plot"):
        draw(page, plot)
    page.locator("#theme").click()
    page.locator("#prompts-explorer [data-part=heat]").hover()
    assert view.console == []
    assert [url for url in view.requests if not url.startswith(("data:", "blob:"))] == [
        file.resolve().as_uri()
    ]


def test_the_curve_and_its_marks_are_drawn(page: Page) -> None:
    draw(page, "#curve")
    found = colours(page, "#curve")
    assert near(found, BLUE)
    assert near(found, (213, 94, 0))
    draw(page, "#local")
    assert near(colours(page, "#local"), (230, 159, 0))
    draw(page, "#groups-plot")
    found = colours(page, "#groups-plot")
    assert near(found, BLUE)
    assert near(found, (213, 94, 0))


def test_the_map_has_the_colours_of_its_values(page: Page) -> None:
    for explorer in ("#prompts-explorer", "#tokens-explorer"):
        page.locator(f"{explorer} [data-part=heat]").scroll_into_view_if_needed()
        found = colours(page, f"{explorer} [data-part=heat]")
        assert len(found) > 10
        assert near(found, VIRIDIS_ENDS[1], 3)
        assert near(found, (217, 213, 204), 0), "the gap has the colour of what was not measured"


def test_pointing_at_a_cell_says_which_and_how_much(page: Page, record: ActivationDiffRecord) -> None:
    heat = page.locator("#prompts-explorer [data-part=heat]")
    heat.scroll_into_view_if_needed()
    box = heat.bounding_box()
    assert box is not None
    row_height = box["height"] / N_PROMPTS
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 10.5 * row_height)
    said = page.locator("#prompts-explorer [data-part=readout]").inner_text()
    value = record.results.column("divergence")[10, -1]
    assert said == f"Prompt 10, layer {N_LAYERS - 1}: {value:.4f} Prompt number 3"
    page.mouse.move(0, 0)
    assert "arrow keys" in page.locator("#prompts-explorer [data-part=readout]").inner_text()


def test_pointing_at_the_curve_shows_the_layer(page: Page, record: ActivationDiffRecord) -> None:
    draw(page, "#curve")
    box = page.locator("#curve .nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#curve .hoverlayer .legend")
    said = page.locator("#curve .hoverlayer").text_content() or ""
    told = [f"Layer {layer.layer}|{layer.divergence:.4f}".split("|") for layer in record.layers]
    assert any(name in said and value in said for name, value in told)


def test_a_click_and_enter_show_the_whole_prompt(page: Page, record: ActivationDiffRecord) -> None:
    heat = page.locator("#prompts-explorer [data-part=heat]")
    heat.click(position={"x": 200, "y": 2})
    detail = page.locator("#prompts-explorer [data-part=detail]")
    assert detail.locator("h4").inner_text() == "Prompt 0"
    assert detail.locator("pre").inner_text() == HOSTILE[0]
    heat.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    live = page.locator("#prompts-explorer [data-part=live]")
    assert live.text_content() == live_text(record, 1, detail_layer=live.text_content() or "")
    page.keyboard.press("Enter")
    assert detail.locator("h4").inner_text() == "Prompt 1"
    values = [
        cell_value(td)
        for td in detail.locator("td[data-value]").evaluate_all("all => all.map(c => c.dataset.value)")
    ]
    assert values == [None if np.isnan(v) else v for v in record.results.column("divergence")[1].tolist()]
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert detail.locator("h4").inner_text() == f"Prompt {N_PROMPTS - 1}"


def live_text(record: ActivationDiffRecord, row: int, detail_layer: str) -> str:
    layer = int(detail_layer.split("layer ")[1].split(":")[0])
    value = record.results.column("divergence")[row, layer]
    shown = "–" if np.isnan(value) else f"{value:.4f}"
    return f"Prompt {row}, layer {layer}: {shown}. {record.prompts[row].text}"


def cell_value(text: str) -> float | None:
    return float(text) if text else None


def test_map_and_table_follow_the_same_order_and_search(view: Opened, record: ActivationDiffRecord) -> None:
    page, values = view.page, record.results.column("divergence")
    expected = np.argsort(-np.nanmax(values, axis=1), kind="stable").tolist()
    assert first_rows(page) == expected[:25]
    order(page, "given")
    assert first_rows(page) == list(range(25))
    order(page, "worst")
    assert first_rows(page) == expected[:25]
    heat = page.locator("#prompts-explorer [data-part=heat]")
    assert near({pixel(page, "#prompts-explorer [data-part=heat]", -5, 4)}, VIRIDIS_ENDS[1])
    heat.click(position={"x": 300, "y": 2})
    assert page.locator("#prompts-explorer [data-part=detail] h4").inner_text() == f"Prompt {expected[0]}"
    order(page, "group")
    assert first_rows(page) == list(range(0, 50, 2))
    page.locator("#prompts-explorer [data-part=search]").fill("NUMBER 1")
    found = [p.index for p in record.prompts if "number 1" in p.text]
    assert sorted(first_rows(page)) == found
    assert (
        page.locator("#prompts-explorer [data-part=count]").inner_text()
        == f"{len(found)} prompts of {N_PROMPTS}"
    )
    page.locator("#prompts-explorer [data-part=search]").fill("nothing has this")
    assert first_rows(page) == []


def test_the_paged_table_is_the_json_cell_by_cell(page: Page, record: ActivationDiffRecord) -> None:
    values = record.results.column("divergence")
    seen: list[list[float | None]] = []
    nexts = page.locator("#prompts-explorer [data-part=pager] button", has_text="Next")
    while True:
        rows = page.locator("#prompts-explorer [data-part=table] tbody tr").evaluate_all(
            "rows => rows.map(r => [...r.querySelectorAll('td[data-value]')].map(c => c.dataset.value))"
        )
        seen += [[cell_value(text) for text in row] for row in rows]
        if nexts.is_disabled():
            break
        nexts.press("Enter")
    assert seen == [[None if np.isnan(v) else v for v in row] for row in values.tolist()]
    assert "Rows 51–60 of 60" in page.locator("#prompts-explorer [data-part=pager]").inner_text()


def test_the_table_of_layers_is_the_json_cell_by_cell(page: Page, record: ActivationDiffRecord) -> None:
    rows = page.locator("#layers-table tbody tr").evaluate_all(
        "rows => rows.map(r => Object.fromEntries([...r.querySelectorAll('td')]"
        ".map(c => [c.dataset.field, c.dataset.value])))"
    )
    places = [record.sites[0], *record.layers, record.sites[1]]
    assert len(rows) == len(places)
    for place, row in zip(json.loads(msgspec.json.encode(places)), rows, strict=True):
        for name in (
            "divergence",
            "cosine_similarity",
            "relative_l2",
            "norm_ratio",
            "noise_floor",
            "top1_share",
        ):
            assert cell_value(row[name]) == place[name]
        assert [cell_value(row["low"]), cell_value(row["high"])] == place["interval"]


def test_all_digits_are_shown_when_asked_for(page: Page, record: ActivationDiffRecord) -> None:
    cell = page.locator("#layers-table tbody tr").nth(1).locator("td[data-field=divergence]")
    assert cell.inner_text() == f"{record.layers[0].divergence:.4f}"
    page.locator("#digits").press("Space")
    assert cell.inner_text() == repr(record.layers[0].divergence)
    page.locator("#digits").press("Space")
    assert cell.inner_text() == f"{record.layers[0].divergence:.4f}"


def test_the_scale_changes_by_keyboard(page: Page) -> None:
    draw(page, "#curve")
    page.locator("[data-scale=curve] input[value=linear]").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.getElementById('curve').layout.yaxis.type") == "log"
    assert near(colours(page, "#curve"), BLUE)


def test_every_control_can_be_reached_and_shows_it(page: Page) -> None:
    wanted = page.evaluate(
        "[...document.querySelectorAll('button, select, input, a[href], [tabindex=\"0\"]')]"
        ".filter(e => !e.disabled && e.checkVisibility()).length"
    )
    seen = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "(() => { const e = document.activeElement; if (e === document.body) return null;"
                " const shown = e.matches('.switch input') ? e.nextElementSibling : e;"
                " return [[...document.querySelectorAll('*')].indexOf(e),"
                " getComputedStyle(shown).outlineStyle !== 'none'].join() })()"
            )
        )
    reached = {place for place in seen if place}
    assert all(place.endswith("true") for place in reached), "a control without a visible focus"
    # Of two radio buttons of one switch, Tab reaches the chosen one.
    assert len(reached) == wanted - 2


def test_another_prompts_tokens_are_shown_when_chosen(page: Page, record: ActivationDiffRecord) -> None:
    assert record.tokens is not None
    page.locator("#tokens-prompt").select_option("1")
    cells = page.locator("#tokens-explorer [data-part=table] tbody th").all_text_contents()
    assert len(cells) == len(record.tokens[1].tokens)
    values = page.locator("#tokens-explorer [data-part=table] td[data-value]").evaluate_all(
        "all => all.map(c => c.dataset.value)"
    )
    kl, divergence = record.tokens[1].kl or [], record.tokens[1].divergence
    rows = [[own, *row] for own, row in zip(kl, divergence, strict=True)]
    assert [cell_value(v) for v in values] == [v for row in rows for v in row]


def test_the_text_is_coloured_by_kl_and_says_what_comes_next(
    page: Page, record: ActivationDiffRecord
) -> None:
    assert record.tokens is not None
    trace = next(t for t in record.tokens if t.parting is not None)
    assert trace.kl is not None
    assert trace.base_choices is not None
    assert trace.parting is not None
    page.locator("#tokens-prompt").select_option(str(record.tokens.index(trace)))
    spans = page.locator("#tokens-text span")
    assert spans.count() == len(trace.tokens)
    largest = max(range(len(trace.kl)), key=lambda i: trace.kl[i] or 0.0 if trace.kl else 0.0)
    strength = "e => Number((e.style.background.match(/([0-9.]+)%/) || [0, 0])[1])"
    strengths = [spans.nth(i).evaluate(strength) for i in range(len(trace.tokens))]
    assert strengths[largest] == max(strengths) > 0
    assert strengths[0] == 0  # nothing is known of it
    framed = page.locator("#tokens-text .parting")
    assert framed.get_attribute("data-row") == str(trace.positions.index(trace.parting.position))
    assert "more than noise explains" in page.locator("#tokens-parting").inner_text()
    spans.nth(largest).hover()
    shown = page.locator("#tokens-after").inner_text()
    assert trace.base_choices[largest][0].token in shown
    assert "75 %" in shown
    spans.nth(largest).click()
    caption = page.locator("#tokens-explorer .choices caption").inner_text()
    assert caption.endswith("nats")
    assert page.locator("#tokens-explorer .choices .token").count() == 4


def test_hostile_prompts_are_text(view: Opened) -> None:
    page = view.page
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    order(page, "given")
    first = page.locator("#prompts-explorer [data-part=table] tbody th").first
    assert first.inner_text() == "<script>window.pwned=1</script>"
    page.locator("#prompts-explorer [data-part=table] tbody th button").nth(6).click()
    shown = page.locator("#prompts-explorer [data-part=detail] pre").text_content()
    assert shown == HOSTILE[6].replace("\x00", "␀").replace("\x1b", "␛")
    assert view.console == []


def test_the_policy_stops_a_script_that_is_put_into_the_page(page: Page) -> None:
    page.evaluate(
        "new Promise(done => { document.addEventListener('securitypolicyviolation', e => {"
        " window.violated = e.effectiveDirective; done(); });"
        " const s = document.createElement('script'); s.textContent = 'window.pwned = 9';"
        " document.body.append(s); })"
    )
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("window.violated") == "script-src-elem"


def test_the_policy_stops_a_request(page: Page) -> None:
    said = page.evaluate("fetch('https://example.invalid/').then(() => 'went out', e => e.name)")
    assert said == "TypeError"
    violated = page.evaluate(
        "new Promise(done => { document.addEventListener('securitypolicyviolation',"
        " e => done(e.effectiveDirective)); fetch('https://example.invalid/').catch(() => {}); })"
    )
    assert violated == "connect-src"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [LAPTOP, PHONE])
def test_axe_finds_no_serious_fault(browser: Browser, file: Path, scheme: str, window: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, file, color_scheme=scheme, viewport=window) as found:
        ready(found.page)
        for plot in ("#curve", "#local", "#groups-plot"):
            draw(found.page, plot)
        violations = Axe().run(found.page).response["violations"]
    serious = [
        (v["id"], [node["html"][:120] for node in v["nodes"][:3]])
        for v in violations
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_the_theme_follows_the_system_and_the_button(browser: Browser, file: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, file, color_scheme="dark") as found:
        ready(found.page)
        dark = found.page.evaluate(paper)
        draw(found.page, "#curve")
        assert near(colours(found.page, "#curve"), SKY)
        assert found.page.locator("#theme").inner_text() == "Light theme"
        found.page.locator("#theme").press("Enter")
        light = found.page.evaluate(paper)
        assert near(colours(found.page, "#curve"), BLUE)
    assert sum(channels(dark)) < 150 < 700 < sum(channels(light))


def channels(colour: str) -> list[int]:
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_does_not_scroll_sideways(browser: Browser, file: Path, width: int) -> None:
    with opened(browser, file, viewport={"width": width, "height": 844}) as found:
        ready(found.page)
        draw(found.page, "#groups-plot")
        wide = found.page.evaluate("document.documentElement.scrollWidth")
        outside = found.page.evaluate(
            "[...document.querySelectorAll('main > section')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1).length"
        )
    assert (wide, outside) == (width, 0)


def test_without_scripts_the_words_and_the_tables_are_there(browser: Browser, file: Path) -> None:
    with opened(browser, file, java_script_enabled=False) as found:
        text = found.page.locator("body").inner_text()
        assert found.page.locator("#layers-table tbody tr").count() == N_LAYERS + 2
        assert not found.page.locator("#curve").is_visible()
        assert not found.page.locator("#theme").is_visible()
    assert "Changed: relative L2" in text
    assert "The plots need JavaScript." in text


EDGES = {
    "one prompt, one layer": record_of(np.array([[0.3]])),
    "nothing but zeros": record_of(np.zeros((5, 4))),
    "zeros, gaps and values": record_of(
        np.array([[0.0, 0.0, np.nan, 0.01], [0.0, 0.0, np.nan, 0.02], [np.nan, np.nan, np.nan, np.nan]])
    ),
    "a text of every kind, empty too": record_of(divergences(3, 2), ["", " ", "\n"]),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_are_drawn_on_both_scales(browser: Browser, name: str, tmp_path: Path) -> None:
    with opened(browser, saved(EDGES[name], tmp_path)) as found:
        page = found.page
        ready(page)
        draw(page, "#curve")
        log = page.locator("[data-scale=curve] input[value=log]")
        assert log.is_disabled() == (name == "nothing but zeros")
        if log.is_enabled():
            log.check(force=True)
        assert near(colours(page, "#curve"), BLUE, 40)
        heat = page.locator("#prompts-explorer [data-part=heat]")
        heat.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#prompts-explorer [data-part=live]").text_content() != ""
        page.locator("#prompts-explorer [data-part=scale]").select_option("log")
        assert found.console == []


def test_a_gap_in_the_curve_is_a_gap(browser: Browser, tmp_path: Path) -> None:
    record = EDGES["zeros, gaps and values"]
    with opened(browser, saved(record, tmp_path)) as found:
        ready(found.page)
        draw(found.page, "#curve")
        drawn = found.page.evaluate(
            "document.getElementById('curve').data.find(t => t.name === 'divergence').y.map(v => v ?? null)"
        )
        assert drawn == [layer.divergence for layer in record.layers]
        assert drawn[2] is None
        assert "gap" in found.page.locator("#curve-note").inner_text()


def test_models_of_other_width_show_cka(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, saved(cka_record(), tmp_path)) as found:
        ready(found.page)
        draw(found.page, "#cka")
        assert near(colours(found.page, "#cka"), BLUE)
        assert found.page.locator("#prompts-explorer [data-part=heat]").count() == 0
        assert first_rows_of_texts(found.page) == [f"Prompt number {i}" for i in range(5)]
        assert found.console == []


def first_rows_of_texts(page: Page) -> list[str]:
    return page.locator("#prompts-explorer [data-part=table] tbody th").all_text_contents()


def test_a_thousand_prompts_scroll_within_the_map(browser: Browser, tmp_path: Path) -> None:
    values = divergences(1000, 80)
    with opened(browser, saved(record_of(values), tmp_path)) as found:
        page = found.page
        ready(page)
        heat = page.locator("#prompts-explorer [data-part=heat]")
        order(page, "given")
        heat.focus()
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        assert page.locator("#prompts-explorer [data-part=detail] h4").inner_text() == "Prompt 999"
        assert heat.evaluate("e => e.scrollTop + e.clientHeight >= e.scrollHeight - 1")
        box = heat.bounding_box()
        assert box is not None
        heat.hover(position={"x": box["width"] - 30, "y": box["height"] - 1})
        said = page.locator("#prompts-explorer [data-part=readout]").inner_text()
        layer = int(said.split("layer ")[1].split(":")[0])
        assert said == f"Prompt 999, layer {layer}: {values[999, layer]:.4f} Prompt number 999"
        assert layer > 70
        assert found.console == []


def test_the_browser_reads_the_matrix_bit_for_bit(page: Page, record: ActivationDiffRecord) -> None:
    worst = page.locator("#prompts-explorer [data-part=table] tbody tr").nth(3).locator("td[data-value]")
    shown = worst.evaluate_all("all => all.map(c => Number(c.dataset.value))")
    ours = record.results.column("divergence")[3].tolist()
    assert [struct.pack("<d", v) for v in shown] == [struct.pack("<d", v) for v in ours]


def test_the_library_is_run_only_when_a_plot_is_near(browser: Browser, file: Path) -> None:
    with opened(browser, file, viewport={"width": 1280, "height": 120}) as found:
        ready(found.page)
        assert found.page.evaluate("typeof window.Plotly") == "undefined"
        draw(found.page, "#curve")
        assert found.page.evaluate("window.Plotly.version") in assets.plotly()[:200]
