"""weight-diff's report: what is in it, and what a person sees of it in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from browser import LAPTOP, PHONE, Opened, chromium, opened
from lazarus.render.base import assets
from lazarus.render.weights import page as weight_page
from lazarus.render.weights import payload as weight_payload
from lazarus.render.weights.answers import answers
from lazarus.render.weights.grid import Grid
from lazarus.results import TensorRecord, WeightDiffRecord
from made_records import HOSTILE
from made_weights import expert_record, record_of, settings, spectrum, tensor, whole_record

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MOST_BYTES = 3_000_000
MAP = "#tensors-explorer"


def html_of(record: WeightDiffRecord) -> str:
    stream = io.BytesIO()
    weight_page.write_html(record, stream)
    return stream.getvalue().decode("utf-8")


def data_of(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def floats(matrix: Any) -> Any:
    data = np.frombuffer(base64.b64decode(matrix["base64"]), dtype="<f8")
    return data.reshape(matrix["rows"], matrix["columns"])


# --- What is in the file


def test_the_page_holds_the_very_numbers_of_the_result() -> None:
    record = whole_record()
    data = data_of(html_of(record))
    np.testing.assert_array_equal(floats(data["map"]), Grid.of(record).changes(record))
    for name, column in data["tensors"]["columns"].items():
        ours = [[getattr(row, name) for row in record.results]]
        np.testing.assert_array_equal(floats(column), np.array(ours, dtype=float))
    names = [
        f".{layer}.".join(data["tensors"]["names"][i])
        for layer, i in zip(data["tensors"]["layer"], data["tensors"]["name"], strict=True)
    ]
    assert names == [row.name for row in record.results]
    for i, row in enumerate(record.results):
        found = data["spectra"].get(str(i))
        assert found == (msgspec.structs.asdict(row.spectrum) if row.spectrum else None)


def test_equal_results_give_equal_bytes() -> None:
    assert html_of(whole_record()) == html_of(whole_record())


def test_the_policy_lets_its_one_script_run_and_nothing_else() -> None:
    html = html_of(whole_record())
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', ""]
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', html)
    assert policy is not None
    assert f"script-src {assets.csp_hash(scripts[1][1])};" in policy[1].replace("&#39;", "'")
    assert "default-src &#39;none&#39;" in policy[1]
    assert "plotly" not in html.lower()


def test_every_script_of_the_folder_is_in_the_page() -> None:
    own = Path(weight_page.__file__).parent / "js"
    assert {path.stem for path in own.glob("*.js")} <= set(weight_page.KIT.scripts)
    common = {path.stem for path in (assets.HERE / "js").glob("*.js")}
    assert set(weight_page.KIT.scripts) <= common | {path.stem for path in own.glob("*.js")}


def test_names_are_text_wherever_they_stand() -> None:
    rows = [tensor(i, f"{name}/权重", 0.1, name=name) for i, name in enumerate(HOSTILE)]
    rows += [tensor(None, name, 0.1, name=name * 50) for name in HOSTILE]
    html = html_of(record_of(rows, notes=list(HOSTILE)))
    assert len(re.findall("<script", html)) == 2 + html.count('"<script')
    assert "<img" not in html
    assert "&lt;script&gt;window.pwned=1&lt;/script&gt;" in html


@pytest.mark.parametrize("with_spectra", [False, True])
def test_a_large_mixture_of_experts_stays_small(with_spectra: bool) -> None:
    record = expert_record()
    if with_spectra:
        rows = [
            msgspec.structs.replace(row, spectrum=spectrum(64)) if row.n_changed else row
            for row in record.results
        ]
        record = msgspec.structs.replace(record, results=rows, settings=settings(spectrum=True))
    html = html_of(record)
    assert len(html.encode()) < MOST_BYTES
    data = data_of(html)
    assert len(data["tensors"]["layer"]) == len(record.results) == 18_769
    assert data["map"]["rows"] == 7 + 3 * 128
    assert (f"{weight_payload.MOST_SPECTRA:,} of the 18,673 spectra" in html) == with_spectra


def test_what_there_is_no_room_for_is_the_least_changed_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_payload, "MOST_TENSORS", 20)
    monkeypatch.setattr(weight_payload, "MOST_CELLS", 12 * 4)
    record = whole_record()
    html = html_of(record)
    data = data_of(html)
    kept = floats(data["tensors"]["columns"]["relative_change"])[0]
    ours = sorted((r.relative_change for r in record.results if r.relative_change is not None), reverse=True)
    assert np.isnan(kept).sum() == 1, "what has no relative change is kept"
    assert sorted(kept[~np.isnan(kept)], reverse=True) == ours[:19]
    assert len(data["components"]) == 4
    assert "mlp_down" in data["components"]
    assert "This page has room for 20 of the 111 tensors in the table" in html
    assert "This page has room for 4 of the 9 components in the map" in html


def replies(record: WeightDiffRecord) -> list[str]:
    return [answer.answer for answer in answers(record)]


def with_ranks(*ranks: int | None) -> WeightDiffRecord:
    return record_of(
        [tensor(i, "attn_q", 0.1 + i / 100, spectrum=spectrum(64, r)) for i, r in enumerate(ranks)]
    )


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (record_of([]), ["No", "Nowhere", "None", "Not measured"]),
        (record_of([tensor(0, "attn_q", 0.0)]), ["No", "Nowhere", "None", "Not measured"]),
        (record_of([tensor(None, "embed", 0.1)]), ["Yes", "Outside the layers", "embed", "Not measured"]),
        (record_of([tensor(3, "attn_q", None)]), ["Yes", "From layer 3", "Not known", "Not measured"]),
        (with_ranks(8, 8), ["Yes", "Layer 1", "attn_q", "Yes, rank 8"]),
        (with_ranks(8, None), ["Yes", "Layer 1", "attn_q", "In part"]),
        (with_ranks(None), ["Yes", "Layer 0", "attn_q", "No"]),
    ],
)
def test_the_four_answers(record: WeightDiffRecord, wanted: list[str]) -> None:
    assert replies(record) == wanted


def test_the_component_is_the_one_with_the_largest_change_of_all_its_tensors() -> None:
    rows = [tensor(i, "attn_q", v) for i, v in enumerate([0.3, 0.01])]
    rows += [tensor(i, "expert_0.mlp_up", v) for i, v in enumerate([0.25, 0.25])]
    assert replies(record_of(rows))[2] == "experts.mlp_up"


def test_what_was_not_measured_is_not_shown() -> None:
    plain, whole = html_of(record_of([tensor(0, "attn_q", 0.1)])), html_of(whole_record())
    assert "Run with --spectrum" in plain
    for part in ('id="updates"', 'id="unmatched"', "Roy &amp; Vetterli"):
        assert part in whole
        assert part not in plain


# --- What a person sees


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def record() -> WeightDiffRecord:
    return whole_record()


@pytest.fixture(scope="module")
def file(record: WeightDiffRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(record, tmp_path_factory.mktemp("weights"))


@pytest.fixture
def view(browser: Browser, file: Path) -> Iterator[Opened]:
    with opened(browser, file) as found:
        ready(found.page)
        yield found


def saved(record: WeightDiffRecord, folder: Path) -> Path:
    path = folder / "weights.html"
    path.write_text(html_of(record), encoding="utf-8")
    return path


def ready(page: Page) -> None:
    page.wait_for_selector("html[data-ready]", state="attached")


def part(page: Page, name: str) -> Any:
    return page.locator(f"{MAP} [data-part={name}]")


def first_column(page: Page) -> list[str]:
    found: list[str] = part(page, "table").locator("tbody th").all_text_contents()
    return found


def where(row: TensorRecord) -> str:
    return row.component if row.layer is None else f"layer {row.layer} {row.component}"


@pytest.mark.browser
def test_nothing_is_asked_of_a_network_and_nothing_is_said(view: Opened, file: Path) -> None:
    view.page.locator("#theme").click()
    part(view.page, "heat").hover()
    assert view.console == []
    assert [url for url in view.requests if not url.startswith("data:")] == [file.resolve().as_uri()]


@pytest.mark.browser
def test_pointing_tells_the_cell_and_a_click_shows_the_tensor(view: Opened, record: WeightDiffRecord) -> None:
    page, grid = view.page, Grid.of(record)
    box = part(page, "heat").bounding_box()
    cell = page.locator(".picked").bounding_box()
    assert cell is not None
    row = grid.components.index("attn_o")
    x, y = cell["x"] + cell["width"] / 2 - box["x"] - 2 * cell["width"], (row + 0.5) * cell["height"]
    part(page, "heat").hover(position={"x": x, "y": y})
    ours = record.results[grid.places[row, 9]]
    assert part(page, "readout").inner_text() == f"layer 9 attn_o: {ours.relative_change:.6f}"
    part(page, "heat").click(position={"x": x, "y": y})
    assert part(page, "detail").locator("h4").inner_text() == "layer 9 attn_o"
    assert ours.name in part(page, "detail").inner_text()
    shown = (
        part(page, "detail")
        .locator("table.told")
        .first.locator("td")
        .evaluate_all("all => all.map(c => Number(c.dataset.value))")
    )
    wanted = [
        ours.relative_change,
        ours.cosine_similarity,
        ours.max_abs_change,
        ours.share_changed,
        ours.change_norm,
        ours.base_norm,
    ]
    assert [struct.pack("<d", v) for v in shown] == [struct.pack("<d", v or 0.0) for v in wanted]


@pytest.mark.browser
def test_at_first_the_most_changed_tensor_is_shown_with_its_singular_values(view: Opened) -> None:
    detail = part(view.page, "detail")
    assert detail.locator("h4").inner_text() == "layer 11 mlp_down"
    values = detail.locator("table", has_text="largest singular values").locator("tbody td[data-value]")
    assert [float(v) for v in values.evaluate_all("all => all.map(c => c.dataset.value)")] == (
        spectrum(64).singular_values
    )
    changes = detail.locator("table", has_text="The same component at each layer")
    assert changes.locator("tbody tr").count() == 12
    assert changes.locator("tr.chosen th").inner_text() == "11"


@pytest.mark.browser
def test_the_keyboard_moves_and_chooses(view: Opened, record: WeightDiffRecord) -> None:
    page = view.page
    part(page, "heat").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    ours = next(r for r in record.results if (r.layer, r.component) == (1, "attn_k"))
    assert part(page, "live").text_content() == f"layer 1 attn_k: {ours.relative_change:.6f}."
    page.keyboard.press("Enter")
    assert part(page, "detail").locator("h4").inner_text() == "layer 1 attn_k"
    assert part(page, "live").text_content() == "layer 1 attn_k is shown."
    page.keyboard.press("End")
    assert "mlp_down" in part(page, "readout").inner_text()


@pytest.mark.browser
def test_a_small_change_and_none_are_told_apart(view: Opened) -> None:
    part(view.page, "heat").focus()
    view.page.keyboard.press("ArrowRight")
    assert part(view.page, "readout").inner_text() == "layer 1 attn_norm: –"
    view.page.keyboard.press("ArrowDown")
    assert part(view.page, "readout").inner_text() == "layer 1 attn_q: 3.0e-08"
    assert "exactly 0" in part(view.page, "key").inner_text()


@pytest.mark.browser
def test_search_narrows_the_map_and_the_table(view: Opened, record: WeightDiffRecord) -> None:
    page = view.page
    part(page, "search").fill("self_attn.q")
    wanted = [where(row) for row in record.results if row.component == "attn_q"]
    assert first_column(page) == wanted
    assert part(page, "count").inner_text() == "12 tensors of 111"
    part(page, "heat").focus()
    page.keyboard.press("End")
    assert "attn_q" in part(page, "readout").inner_text()
    part(page, "search").fill("no such thing")
    assert first_column(page) == []
    assert part(page, "count").inner_text() == "0 tensors of 111"


@pytest.mark.browser
def test_orders_and_headings_sort(view: Opened, record: WeightDiffRecord) -> None:
    page = view.page
    assert first_column(page) == [where(row) for row in record.results[:25]]
    known = [row for row in record.results if row.relative_change is not None]
    ranked = sorted(known, key=lambda row: -(row.relative_change or 0.0))
    part(page, "sort").select_option("worst")
    assert first_column(page) == [where(row) for row in ranked[:25]]
    part(page, "heat").focus()
    page.keyboard.press("PageUp")
    assert "mlp_down" in part(page, "readout").inner_text()
    page.get_by_role("button", name="Cosine").click()
    heading = part(page, "table").locator("th[data-key=cosine_similarity]")
    assert heading.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="Cosine").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert first_column(page)[0] == where(ranked[0])
    page.get_by_role("button", name="Last").click()
    assert first_column(page)[-1] == "layer 1 attn_norm", "without a number it is last"


@pytest.mark.browser
def test_a_tensor_outside_the_layers_is_shown_from_the_list_and_the_table(view: Opened) -> None:
    page = view.page
    part(page, "outside").get_by_role("button", name="lm_head").click()
    assert part(page, "detail").locator("h4").inner_text() == "lm_head"
    assert not page.locator(".picked").is_visible()
    part(page, "table").get_by_role("button", name="embed").click()
    assert part(page, "detail").locator("h4").inner_text() == "embed"
    part(page, "table").get_by_role("button", name="layer 0 attn_v").click()
    assert page.locator(".picked").is_visible()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [LAPTOP, PHONE])
def test_axe_finds_no_serious_fault(browser: Browser, file: Path, scheme: str, window: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, file, color_scheme=scheme, viewport=window) as found:
        ready(found.page)
        violations = Axe().run(found.page).response["violations"]
        wide = found.page.evaluate("document.documentElement.scrollWidth")
    serious = [
        (v["id"], [node["html"][:120] for node in v["nodes"][:3]])
        for v in violations
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert wide == window["width"]


@pytest.mark.browser
def test_without_scripts_the_words_and_the_tables_are_there(browser: Browser, file: Path) -> None:
    with opened(browser, file, java_script_enabled=False) as found:
        text = found.page.locator("body").inner_text()
        assert found.page.locator("#layers-table tbody tr").count() == 12 + 3
        assert not found.page.locator(MAP).is_visible()
    assert "87 of 111 tensors differ" in text
    assert "visual.proj.weight" in text


EDGES = {
    "nothing": record_of([]),
    "one tensor": record_of([tensor(0, "attn_q", 0.2)]),
    "identical": record_of([tensor(0, "attn_q", 0.0)]),
    "not finite": record_of([tensor(0, "attn_q", None)]),
    "outside only": record_of([tensor(None, f"part_{i}", 0.01 * i) for i in range(30)]),
    "hostile": record_of([tensor(i, f"{n}/权重" * 9, 0.1, name=n) for i, n in enumerate(HOSTILE)]),
    "gaps": record_of([tensor(0, "attn_q", 0.1), tensor(2, "ssm", 0.2)]),
}


@pytest.mark.browser
@pytest.mark.parametrize("name", EDGES)
def test_edges_open_without_a_word(browser: Browser, name: str, tmp_path: Path) -> None:
    with opened(browser, saved(EDGES[name], tmp_path), viewport=PHONE) as found:
        page = found.page
        ready(page)
        assert len(first_column(page)) == min(25, len(EDGES[name].results))
        if part(page, "heat").count():
            part(page, "heat").focus()
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Enter")
            part(page, "scale").select_option("log")
        assert found.console == []
        assert page.evaluate("window.pwned") is None
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


@pytest.mark.browser
def test_a_gap_is_told(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, saved(EDGES["gaps"], tmp_path)) as found:
        ready(found.page)
        part(found.page, "heat").focus()
        found.page.keyboard.press("ArrowRight")
        assert part(found.page, "readout").inner_text() == "layer 2 attn_q: no such tensor"
        found.page.keyboard.press("Enter")
        assert "There is no such tensor." in part(found.page, "detail").inner_text()


@pytest.mark.browser
def test_a_large_mixture_of_experts_opens_at_once(browser: Browser, tmp_path: Path) -> None:
    record = expert_record()
    with opened(browser, saved(record, tmp_path)) as found:
        page = found.page
        ready(page)
        took = page.evaluate("performance.now()")
        part(page, "search").fill("expert_121.mlp_up")
        part(page, "heat").focus()
        page.keyboard.press("Enter")
        assert part(page, "detail").locator("h4").inner_text() == "layer 0 expert_121.mlp_up"
        assert len(first_column(page)) == 25
        assert part(page, "count").inner_text() == "48 tensors of 18,769"
    assert took < 10_000, "a page of this size is there within a second or so; tests share the processor"
