"""compare's page in a real browser: what a person sees, and that nothing else happens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browser import LAPTOP, PHONE, Opened, chromium, opened
from lazarus.render.lens.page import write_html
from lazarus.results import CompareRecord
from made_lens import hostile_record, lens_record, unmeasured_record

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

RECORDS = {
    "plain": lens_record((6, 6)),
    "hostile": hostile_record(),
    "nulls": unmeasured_record(),
    "deep": lens_record((80, 12), top_k=10),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lens")
    return {name: saved(record, folder / f"{name}.html") for name, record in RECORDS.items()}


@pytest.fixture
def view(browser: Browser, files: dict[str, Path]) -> Iterator[Opened]:
    with opened(browser, files["plain"]) as found:
        ready(found.page)
        yield found


def saved(record: CompareRecord, path: Path) -> Path:
    with path.open("wb") as stream:
        write_html(record, stream)
    return path


def ready(page: Page) -> None:
    page.wait_for_selector("html[data-ready]", state="attached")


def channels(colour: str) -> list[float]:
    """Of `rgb(…)` in 0 to 255, or of `color(srgb …)` in 0 to 1, as 0 to 1."""
    numbers = [
        float(part)
        for part in colour[colour.index("(") + 1 : -1].replace("srgb", "").replace(",", " ").split()
    ]
    return numbers[:3] if "srgb" in colour else [number / 255 for number in numbers[:3]]


def luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_nothing_is_asked_of_a_network_and_nothing_is_said(view: Opened, files: dict[str, Path]) -> None:
    view.page.locator("#theme").click()
    view.page.locator("details summary").first.click()
    assert view.console == []
    assert [url for url in view.requests if not url.startswith("data:")] == [
        files["plain"].resolve().as_uri()
    ]


def test_a_cell_is_as_strong_as_its_token_is_probable(view: Opened) -> None:
    cells = view.page.locator(".lens td[data-value]")
    found = cells.evaluate_all(
        "all => all.map(c => [Number(c.dataset.value), getComputedStyle(c).backgroundColor])"
    )
    by_value = sorted((value, luminance(colour)) for value, colour in found)
    assert len(by_value) == 2 * 6 * 5
    assert by_value[0][1] > by_value[-1][1] + 0.1
    assert all(a[1] >= b[1] for a, b in pairwise(by_value))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_token_can_be_read_on_every_colour(browser: Browser, files: dict[str, Path], scheme: Any) -> None:
    with opened(browser, files["plain"], color_scheme=scheme) as found:
        ready(found.page)
        cell = found.page.locator(".lens td[data-value]").first
        for share in (0, 25, 50, 75, 100):
            ink, paper = cell.evaluate(
                "(c, share) => { c.style.setProperty('--share', share + '%');"
                " const s = getComputedStyle(c); return [s.color, s.backgroundColor]; }",
                share,
            )
            light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, share)


def test_the_curves_are_drawn_without_a_script(browser: Browser, files: dict[str, Path]) -> None:
    with opened(browser, files["plain"], java_script_enabled=False) as found:
        figure = found.page.locator("#tracked figure").first
        box = figure.locator("svg").bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert figure.locator("polyline").count() == 2
        assert figure.locator("circle").count() == 2 * 6
        assert not found.page.locator("#theme").is_visible()
        text = found.page.locator("body").inner_text()
    assert "They end with different tokens" in text
    assert "emerges at layer 3" in text


@pytest.mark.parametrize("name", ["hostile", "nulls"])
@pytest.mark.parametrize(("scheme", "window"), [("light", LAPTOP), ("dark", PHONE), ("dark", LAPTOP)])
def test_axe_finds_no_serious_fault(
    browser: Browser, files: dict[str, Path], name: str, scheme: str, window: Any
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, files[name], color_scheme=scheme, viewport=window) as found:
        ready(found.page)
        for summary in found.page.locator("details summary").all():
            summary.click()
        violations = Axe().run(found.page).response["violations"]
        assert found.console == []
    serious = [
        (v["id"], [node["html"][:120] for node in v["nodes"][:3]])
        for v in violations
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_does_not_scroll_sideways(
    browser: Browser, files: dict[str, Path], name: str, width: int
) -> None:
    with opened(browser, files[name], viewport={"width": width, "height": 844}) as found:
        ready(found.page)
        for summary in found.page.locator("details summary").all():
            summary.click()
        assert found.page.evaluate("document.documentElement.scrollWidth") == width


def test_hostile_texts_are_text(browser: Browser, files: dict[str, Path]) -> None:
    with opened(browser, files["hostile"]) as found:
        ready(found.page)
        assert found.page.evaluate("window.pwned") is None
        assert found.page.locator("img").count() == 0
        first = found.page.locator(".lens td bdi").first
        assert first.text_content() == "<script>window.pwned=1</script>"
        assert found.console == []


def test_the_theme_follows_the_system_and_the_button(browser: Browser, files: dict[str, Path]) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, files["plain"], color_scheme="dark") as found:
        ready(found.page)
        dark = found.page.evaluate(paper)
        assert found.page.locator("#theme").inner_text() == "Light theme"
        found.page.locator("#theme").press("Enter")
        light = found.page.evaluate(paper)
    assert luminance(dark) < 0.1 < 0.8 < luminance(light)


def test_numbers_show_all_their_digits_when_pointed_at(view: Opened) -> None:
    record = RECORDS["plain"]
    cell = view.page.locator("#distance td[data-field=js]").nth(2)
    assert cell.get_attribute("title") == repr(record.layers[2].js)


def test_the_policy_stops_a_script_and_a_request(view: Opened) -> None:
    view.page.evaluate(
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 9';"
        " document.body.append(s)"
    )
    assert view.page.evaluate("window.pwned") is None
    said = view.page.evaluate("fetch('https://example.invalid/').then(() => 'went out', e => e.name)")
    assert said == "TypeError"
    assert all("Content Security Policy" in line for line in view.console)
    assert len(view.console) >= 2


def test_every_box_that_scrolls_can_be_reached_by_the_keyboard(
    browser: Browser, files: dict[str, Path]
) -> None:
    with opened(browser, files["deep"]) as found:
        ready(found.page)
        box = found.page.locator(".lenses .box").first
        box.focus()
        found.page.keyboard.press("End")
        scrolled = box.evaluate(
            "async b => { for (let i = 0; i < 120 && !b.scrollTop; i++)"
            " await new Promise(requestAnimationFrame); return b.scrollTop; }"
        )
        assert scrolled > 0
        last = box.locator("tbody tr").last
        assert last.locator("th").inner_text() == "0", "the embedding's side is at the bottom"
