"""The figure for a paper, and the plots of a notebook: the numbers drawn are the numbers of the JSON."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from msgspec.structs import replace
from PIL import Image

import lazarus
from drawn import drawn, of_widths, with_groups, with_layers, with_local
from lazarus.errors import MissingPackageError
from lazarus.render.activation.curve import DIVERGENCE, MOST_GROUPS
from lazarus.render.activation.figure import (
    MOST_PROMPTS_LABELLED,
    compose,
    draw_curve,
    draw_heatmap,
    write_figure,
)
from lazarus.render.base.figure import BLUE, VERMILLION, drawable
from lazarus.results import ActivationDiffRecord, ResultRows, flag_above, write_json

Format = Literal["png", "svg", "pdf"]
FORMATS: tuple[Format, ...] = ("png", "svg", "pdf")

GAPS = (0.02, None, 0.125, 0.25, None, 0.5)
HOSTILE = "$x_1$ <b>\n\u4f60 \U0001f389 \u202e & _a_"
ODD = {
    "one prompt": drawn(n_prompts=1),
    "one layer": with_groups(with_local(drawn((0.2,)), (0.3,)), ["a"]),
    "identical": with_local(drawn((0.0,) * 4), (0.0,) * 4),
    "identical, no noise floor": with_layers(drawn((0.0,) * 4), noise_floor_divergence=None),
    "nothing measured": drawn((None,) * 4),
    "gaps": with_local(drawn(GAPS), GAPS),
    "80 layers": with_groups(drawn([0.001 * i for i in range(80)], 200), ["a", "b"]),
    "hostile names": with_groups(drawn(base=HOSTILE, finetuned=HOSTILE * 20), [HOSTILE, "_", "$"]),
    "other widths": of_widths((0.9, None, 0.7, -0.02)),
    "within the noise": drawn((1e-14, 2e-14, 0.0, 3e-14)),
    "more groups than fit": with_groups(drawn(), [f"g{i}" for i in range(MOST_GROUPS + 3)]),
}


@pytest.fixture(autouse=True)
def _no_window(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MPLBACKEND", "agg")
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


def written(record: ActivationDiffRecord, kind: Format) -> bytes:
    stream = io.BytesIO()
    write_figure(record, stream, kind)
    return stream.getvalue()


def composed(record: ActivationDiffRecord) -> Figure:
    figure = Figure(layout="constrained")
    compose(record, figure)
    figure.draw_without_rendering()
    return figure


def series_of(figure: Figure) -> dict[str, Any]:
    """What is drawn, read back from the artists by the names that they bear."""
    found: dict[str, Any] = {}
    for artist in (child for axes in figure.axes for child in axes.get_children()):
        name = artist.get_gid() or ""
        if isinstance(artist, PolyCollection):
            found[name] = _band(artist)
        elif isinstance(artist, Rectangle) and name:
            found.setdefault(name, []).append(_plain(artist.get_height()))
        elif isinstance(artist, Line2D):
            found[name] = {
                "layers": [_plain(x) for x in np.atleast_1d(artist.get_xdata())],
                "values": [_plain(y) for y in np.atleast_1d(artist.get_ydata())],
            }
    return found


def _band(band: PolyCollection) -> dict[str, list[float]]:
    ends: dict[str, list[float]] = {}
    for x, y in np.concatenate([path.vertices for path in band.get_paths()]):
        known = ends.setdefault(f"{x:g}", [y, y])
        ends[f"{x:g}"] = [min(known[0], y), max(known[1], y)]
    return ends


def _plain(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def document_of(record: ActivationDiffRecord) -> Any:
    stream = io.BytesIO()
    write_json(record, stream)
    return json.loads(stream.getvalue())


def labels_of(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def test_the_series_drawn_are_those_of_the_json() -> None:
    record = with_groups(with_local(drawn(GAPS), (0.1, 0.0, None, 0.3, 0.4, 0.5)), ["a", "b"])
    document, found = document_of(record), series_of(composed(record))
    layers = document["layers"]
    assert found["divergence"]["layers"] == [layer["layer"] for layer in layers]
    assert found["divergence"]["values"] == [layer["divergence"] for layer in layers]
    assert found["noise_floor"]["values"] == [layer["noise_floor_divergence"] for layer in layers]
    unrelated = [layer["unrelated_similarity"] for layer in layers]
    assert found["unrelated"]["values"] == [None if value is None else 1 - value for value in unrelated]
    assert found["local"] == [layer["local"]["relative_l2"] for layer in layers]
    assert found["flagged"]["layers"] == [layer["layer"] for layer in layers if layer["flagged"]]
    for i, curve in enumerate(document["groups"]["curves"]):
        assert found[f"group-{i}"]["values"] == curve["divergence"]


def test_the_band_is_the_interval_also_of_a_layer_without_neighbours() -> None:
    record = drawn(GAPS)
    figure = composed(record)
    band = series_of(figure)["interval"]
    intervals = {str(layer.layer): list(layer.interval) for layer in record.layers if layer.interval}
    assert {layer: band[layer] for layer in ("2", "3")} == {layer: intervals[layer] for layer in ("2", "3")}
    (alone,) = (child for child in figure.axes[0].get_children() if child.get_gid() == "interval-alone")
    lines: Any = alone
    drawn_alone = {f"{line[0][0]:g}": [line[0][1], line[1][1]] for line in lines.get_segments()}
    assert drawn_alone == {layer: intervals[layer] for layer in ("0", "5")}


@pytest.mark.parametrize("name", ["one prompt", "one layer", "gaps", "other widths", "hostile names"])
def test_what_is_drawn_stays_as_it_is(name: str, golden: Callable[[str, str], None]) -> None:
    figure = composed(ODD[name])
    shown = {
        "title": figure.axes[0].get_title(loc="left"),
        "axes": [[axes.get_xlabel(), axes.get_ylabel(), list(axes.get_ylim())] for axes in figure.axes],
        "legend": labels_of(figure),
        "series": series_of(figure),
    }
    golden(f"figure-{name.replace(' ', '-')}.json", json.dumps(shown, indent=1, ensure_ascii=False) + "\n")


@pytest.mark.parametrize(("record", "height"), [(drawn(), 3.0), (with_local(drawn(), (0.1,) * 4), 4.2)])
def test_a_png_is_two_columns_wide_at_300_dots_an_inch(record: ActivationDiffRecord, height: float) -> None:
    image = Image.open(io.BytesIO(written(record, "png")))
    assert image.size == (2040, round(300 * height))
    assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {_rgb(BLUE), _rgb(VERMILLION), (255, 255, 255)} <= colours


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def test_an_svg_holds_its_labels_as_text_of_eight_points() -> None:
    svg = written(drawn(base="org/base"), "svg").decode()
    texts = {element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {"org/base → finetuned", "Layer", DIVERGENCE, "threshold 0.1,", "0", "3"} <= texts
    assert set(re.findall(r"font(?:-size)?: ([\d.]+)px", svg)) == {"8"}


def test_a_pdf_embeds_its_fonts_as_truetype() -> None:
    pdf = written(drawn(), "pdf")
    assert pdf.startswith(b"%PDF-")
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_record_gives_the_same_bytes_on_any_day_whatever_a_reader_has_set(
    kind: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = ODD["one layer"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # the date that matplotlib would write
    first = written(record, kind)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        before = dict(matplotlib.rcParams)
        assert written(record, kind) == first
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("threshold", [0.05, 0.3])
def test_the_threshold_line_and_the_marks_move_with_the_threshold(threshold: float) -> None:
    found = series_of(composed(flag_above(drawn(), threshold)))
    assert found["threshold"]["values"] == [threshold, threshold]
    above = [i for i, value in enumerate((0.02, 0.05, 0.125, 0.25)) if value > threshold]
    assert found.get("flagged", {"layers": []})["layers"] == above


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "svg") for name in ODD]
    + [(name, kind) for name in ("hostile names", "gaps", "nothing measured") for kind in ("png", "pdf")],
)
def test_every_kind_of_result_can_be_drawn(name: str, kind: Format) -> None:
    data = written(ODD[name], kind)
    if kind == "svg":
        ElementTree.fromstring(data.decode())
    if kind == "png":
        assert len(Image.open(io.BytesIO(data)).convert("L").getcolors() or []) > 2


def test_what_is_far_above_the_curve_is_told_and_does_not_flatten_it() -> None:
    figure = composed(drawn((0.001, 0.002)))
    assert figure.axes[0].get_ylim()[1] < 0.004
    assert "threshold 0.1,\noff the scale" in labels_of(figure)
    assert "unrelated prompts, min 0.5,\noff the scale" in labels_of(figure)


def test_names_are_text_and_never_mathematics_or_a_missing_glyph() -> None:
    figure = composed(ODD["hostile names"])
    title = figure.axes[0].get_title(loc="left")
    assert title.startswith("$x_1$ <b>\\n\\u4f60")
    assert "…" in title
    assert labels_of(figure)[2:4] == ["_ (2)", "$ (3)"]
    svg = written(ODD["hostile names"], "svg").decode()
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter()]
    assert any(text.startswith("$x_1$ <b>") and "→" in text for text in texts)
    assert any(text.startswith("$x_1$ <b>") and text.endswith("(1)") for text in texts)


def test_a_long_text_keeps_both_its_ends() -> None:
    assert drawable("start" + "x" * 100_000 + "end", 11) == "start…xxend"


def test_lines_can_be_told_apart_without_colour() -> None:
    record = with_groups(drawn(), [f"g{i}" for i in range(MOST_GROUPS)])
    lines = [line for line in composed(record).axes[0].get_lines() if line.get_linestyle() != "None"]
    styles = [(line._unscaled_dash_pattern, line.get_marker()) for line in lines]  # type: ignore[attr-defined]
    assert len(lines) == MOST_GROUPS + 4
    assert len(set(map(str, styles))) == len(styles)


def test_groups_that_are_not_drawn_are_counted() -> None:
    labels = labels_of(composed(ODD["more groups than fit"]))
    assert "groups not drawn: 3" in labels
    assert sum(label.startswith("g") and label.endswith(")") for label in labels) == MOST_GROUPS


@pytest.mark.parametrize("n_layers", [1, 2, 8, 13, 30, 80, 126])
def test_layers_are_numbered_by_whole_numbers(n_layers: int) -> None:
    axes = composed(drawn([0.1] * n_layers)).axes[0]
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks[0] == 0
    assert all(tick == int(tick) for tick in ticks)
    assert min(n_layers, 5) <= len(ticks) <= 13


def test_models_of_other_depth_are_numbered_by_base() -> None:
    record = with_layers(drawn(), finetuned_layer=[0, 2, 4, 6])
    assert composed(record).axes[0].get_xlabel() == "Layer of base"


def test_a_figure_is_written_without_pyplot_or_torch() -> None:
    code = (
        f"import io, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from drawn import drawn;"
        "from lazarus.render.activation.figure import write_figure;"
        "write_figure(drawn(), io.BytesIO(), 'pdf');"
        "sys.exit(sorted({'matplotlib.pyplot', 'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    strict = ("-W", "error", "-W", "ignore::DeprecationWarning")
    done = subprocess.run([sys.executable, *strict, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_plot_makes_a_figure_or_draws_on_the_axes_given() -> None:
    diff = lazarus.ActivationDiff(with_local(drawn(), (0.1,) * 4))
    new, mine = diff.plot().figure, Figure()
    axes = mine.subplots()
    assert diff.plot(ax=axes) is axes
    assert isinstance(new, Figure)
    assert series_of(mine)["divergence"] == series_of(new)["divergence"]
    assert ["local" in series_of(figure) for figure in (mine, new)] == [False, True]


def heatmap(record: ActivationDiffRecord, *, sort: bool = False) -> Any:
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    draw_heatmap(record, axes, sort=sort)
    figure.draw_without_rendering()
    return axes


def test_the_heatmap_is_every_prompt_at_every_layer() -> None:
    record = drawn((0.1, None, 0.3), 4, prompt="$a_b$ <i>\n")
    axes = heatmap(record)
    shown = axes.images[0].get_array()
    np.testing.assert_array_equal(shown.filled(np.nan), record.results.column("divergence"))
    assert shown.mask[:, 1].all()
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"$a_b$ <i>\\n {i}" for i in range(4)]
    assert not any(text.get_parse_math() for text in axes.get_yticklabels())
    assert axes.figure.axes[1].get_ylabel() == DIVERGENCE


def test_the_heatmap_has_the_most_divergent_prompt_first_if_asked() -> None:
    column = np.array([[0.1, np.nan], [0.5, 0.3], [0.2, 0.2]])
    record = drawn((0.1, 0.2), 3)
    record = replace(record, results=ResultRows(record.results.prompts, {"divergence": column}))
    axes = heatmap(record, sort=True)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["Hello 1", "Hello 2", "Hello 0"]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), column[[1, 2, 0]])


@pytest.mark.parametrize("name", ODD)
def test_every_kind_of_result_has_a_heatmap(name: str) -> None:
    assert heatmap(ODD[name]).images[0].norm.vmin == 0


def test_many_prompts_are_not_labelled() -> None:
    labelled, bare = (heatmap(drawn(n_prompts=MOST_PROMPTS_LABELLED + more)) for more in (0, 1))
    assert len(labelled.get_yticklabels()) == MOST_PROMPTS_LABELLED
    assert not any("Hello" in text.get_text() for text in bare.get_yticklabels())
    assert bare.get_ylabel() == "Prompt"


def test_heatmap_makes_a_figure_of_its_own() -> None:
    axes = lazarus.ActivationDiff(drawn()).heatmap(sort=True)
    assert axes.get_title(loc="left") == "base → finetuned"


def test_draw_curve_takes_any_axes() -> None:
    figure = Figure()
    draw_curve(drawn(), figure.subplots(1, 2)[1])
    assert [len(axes.lines) for axes in figure.axes] == [0, 5]


@pytest.mark.parametrize("method", ["plot", "heatmap"])
def test_without_matplotlib_it_says_what_to_install(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=rf"{method} needs .*'lazarus-introspect\[plot\]'"):
        getattr(lazarus.ActivationDiff(drawn()), method)()
