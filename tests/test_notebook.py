"""How a result shows itself in a notebook, and the example notebook, whose every cell runs."""

from __future__ import annotations

import copy
import os
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from msgspec.structs import replace
from nbclient import NotebookClient

import lazarus
from drawn import drawn, of_widths, with_groups, with_layers, with_local
from lazarus.render.activation.table import SHOWN
from lazarus.results import METRICS, ActivationDiffRecord

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
CELL_SECONDS = 600

HOSTILE = "</td><script>alert(1)</script><img src=x onerror='a()'>{{ 7*7 }}\"&amp;\x00\u202e\ud800"
VOID = {"img", "br", "hr", "input", "meta", "link", "use", "path"}
ALLOWED = {
    *("div", "style", "p", "ul", "li", "details", "summary", "table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "defs", "g", "path", "use", "text", "tspan", "clippath", "rect"),
}
ODD = {
    "plain": drawn(),
    "one prompt": drawn(n_prompts=1),
    "one layer": drawn((0.2,)),
    "nothing measured": drawn((None,) * 3),
    "gaps": with_local(drawn((0.1, None, 0.3)), (None, 0.0, 0.1)),
    "no noise floor": with_layers(drawn(), noise_floor=None, noise_floor_divergence=None),
    "other widths": of_widths((0.9, None, 0.7)),
    "identical": drawn((0.0,) * 3),
    "hostile": with_groups(drawn(base=HOSTILE, finetuned=HOSTILE, prompt=HOSTILE), [HOSTILE, "b"]),
    "no notes": replace(drawn(), notes=[]),
}


class Page(HTMLParser):
    """The elements of a page, its text, and its table of layers."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data


def page(record: ActivationDiffRecord) -> Page:
    return Page(lazarus.ActivationDiff(record)._repr_html_())


@pytest.mark.parametrize("name", ODD)
def test_every_kind_of_result_shows_itself_with_nothing_but_plain_elements(name: str) -> None:
    shown = page(ODD[name])
    assert {tag for tag, _ in shown.tags} <= ALLOWED
    for _, attributes in shown.tags:
        assert not any(key.startswith("on") for key in attributes)
        links = [value or "" for key, value in attributes.items() if key in ("href", "src", "xlink:href")]
        assert all(link.startswith("#") for link in links)
    html = lazarus.ActivationDiff(ODD[name])._repr_html_()
    assert not re.search(r"url\((?!#)|@import", html)
    html.encode()


def test_names_and_prompts_are_text() -> None:
    text = "".join(page(ODD["hostile"]).texts)
    written = HOSTILE.replace("\x00", "\\x00").replace("\u202e", "\\u202e").replace("\ud800", "\\ud800")
    assert text.count(written) >= 2
    assert "{{ 7*7 }}" in text
    assert HOSTILE[:30] in text.split("Prompts at layer")[1]


def test_the_table_holds_the_numbers_of_the_record() -> None:
    record = ODD["gaps"]
    html = lazarus.ActivationDiff(record)._repr_html_()
    shown = Page(html)
    head, *rows = shown.rows
    assert head[: len(SHOWN) + 1] == ["Layer", *(METRICS[name].heading for name in SHOWN)]
    for layer, row in zip(record.layers, rows, strict=True):
        values = [getattr(layer, name) for name in SHOWN]
        told = [
            "–" if value is None else format(value, METRICS[name].format)
            for name, value in zip(SHOWN, values, strict=True)
        ]
        assert row[: len(SHOWN) + 1] == [str(layer.layer), *told]
        assert row[-1] == ("***" if layer.flagged else "")
    exact = [
        float(value or "") for tag, a in shown.tags if tag == "td" for k, value in a.items() if k == "title"
    ]
    assert {layer.divergence for layer in record.layers if layer.divergence is not None} <= set(exact)
    assert [row[head.index("Local")] for row in rows] == ["–", "0.000000", "0.100000"]


def test_it_opens_with_the_verdict_and_folds_the_notes_away() -> None:
    record = drawn()
    shown = page(
        replace(record, summary=replace(record.summary, verdict="identical"), notes=["n1", "n2 <b>"])
    )
    text = "".join(shown.texts)
    assert "base → finetuned" in text
    assert text.index("Verdict: IDENTICAL") < text.index("Most divergent layer: 3")
    assert text.count("Verdict") == 1
    assert "2 notes" in text
    assert "n2 <b>" in text
    assert [tag for tag, _ in shown.tags].count("details") == 2
    assert "note" not in "".join(page(ODD["no notes"]).texts)


def test_the_layers_are_folded_when_they_are_many() -> None:
    tables = [next(a for tag, a in page(drawn([0.1] * n)).tags if tag == "details") for n in (16, 17)]
    assert ["open" in attributes for attributes in tables] == [True, False]


def test_eighty_layers_take_less_than_200_kilobytes() -> None:
    record = with_groups(with_local(drawn([0.001 * i for i in range(80)], 50), [0.01] * 80), ["a", "b", "c"])
    assert len(lazarus.ActivationDiff(record)._repr_html_().encode()) < 200_000


def test_the_curve_takes_the_colours_of_the_notebook_and_leaves_the_page_its_own() -> None:
    html = lazarus.ActivationDiff(drawn())._repr_html_()
    assert "currentColor" in html
    assert not re.search(r"(fill|stroke|color): ?#(000000|ffffff|010203)", html, flags=re.IGNORECASE)
    styles = re.findall(r"<style.*?>(.*?)</style>", html, flags=re.DOTALL)
    selectors = re.findall(r"([^{}]+)\{", styles[0])
    assert len(styles) == 1
    assert all(part.strip().startswith(".lazarus-diff") for rule in selectors for part in rule.split(","))


def test_without_matplotlib_all_but_the_curve_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = page(drawn())
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bare = page(drawn())
    assert ["svg" in {tag for tag, _ in shown.tags} for shown in (whole, bare)] == [True, False]
    assert bare.rows == whole.rows


@pytest.fixture(scope="module")
def executed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook, run anew by this interpreter, in a folder and with settings of its own."""
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    own = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    (folder / "cwd").mkdir()
    with tempfile.TemporaryDirectory(prefix="lz") as sockets:  # short: a socket's path has 100 characters
        manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # none but this interpreter's
            transport="ipc",
            connection_file=f"{sockets}/k.json",
        )
        resources = {"metadata": {"path": str(folder / "cwd")}}
        client = NotebookClient(
            fresh, km=manager, timeout=CELL_SECONDS, resources=resources, record_timing=False
        )
        client.execute(
            env={**environment, **own, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, cleanup_kc=True
        )
    assert list((folder / "cwd").iterdir()) == []
    if request.config.getoption("--update-golden"):
        store(fresh)
    return fresh


def store(fresh: Any) -> None:
    """Keep the notebook with its outputs, but for progress bars and what names the kernel's version."""
    kept = copy.deepcopy(fresh)
    kept.metadata["language_info"] = {"name": "python"}
    for cell in kept.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.validate(kept)
    nbformat.write(kept, NOTEBOOK)


@pytest.fixture(scope="module")
def notebook(executed: Any) -> Any:
    """The notebook as it is stored."""
    return nbformat.read(NOTEBOOK, as_version=4)


def told(cell: Any) -> list[str]:
    """What a cell prints and returns as text; progress bars are no part of it."""
    return [
        output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
        for output in cell.get("outputs", [])
        if output.get("name") != "stderr"
    ]


def test_every_cell_of_the_notebook_runs_and_tells_what_is_stored(notebook: Any, executed: Any) -> None:
    stored, fresh = ([told(cell) for cell in found.cells] for found in (notebook, executed))
    assert stored == fresh
    assert sum(map(len, stored)) >= 9


def test_the_notebook_shows_a_result_and_three_plots(notebook: Any, executed: Any) -> None:
    for found in (notebook, executed):
        kinds = [kind for c in found.cells for o in c.get("outputs", []) for kind in o.get("data", {})]
        assert kinds.count("image/png") == 3
        shown = next(o["data"]["text/html"] for c in found.cells for o in c.get("outputs", []) if "data" in o)
        assert 'class="lazarus-diff"' in shown
        assert "<svg" in shown


def test_the_notebook_names_no_place_of_a_machine(notebook: Any) -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    roots = (str(Path.home()), str(Path.cwd()), sys.prefix, tempfile.gettempdir(), "site-packages", "/home/")
    assert [root for root in roots if root in text] == []
    assert all(
        output.get("name") != "stderr" for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert len(text) < 400_000
