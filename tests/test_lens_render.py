"""What compare shows: exact text, tables that are read back, the page, the figure and the notebook's view."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import pyarrow.parquet
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from msgspec.structs import replace
from PIL import Image

from lazarus.render.base import assets
from lazarus.render.lens import figure, page, plots, table, text
from lazarus.render.lens.summary import names, summary_lines, title
from lazarus.render.lens.tokens import MOST_CHARACTERS, shortened
from lazarus.render.save import formats_of, writer_of
from lazarus.result_classes import Comparison, load_result
from lazarus.results import CompareRecord, LensModel, json_schema
from lazarus.results.lens_glossary import LENS_METRICS
from made_lens import PROMPT, hostile_record, lens_record, unmeasured_record
from made_records import HOSTILE

RECORDS = {
    "plain": lens_record(),
    "other depths": lens_record((6, 3)),
    "the same": lens_record(targets=(2, 2)),
    "one layer, one token": lens_record((1, 1), top_k=1),
    "nulls": unmeasured_record(),
    "hostile": hostile_record(),
    "deep": lens_record((80, 12), top_k=10),
    "nothing tracked": lens_record(tracked=[]),
}
Kind = Literal["png", "svg", "pdf"]


def models(record: CompareRecord) -> tuple[LensModel, LensModel]:
    return record.model1, record.model2


# Text


def test_the_text_of_a_known_result(golden: Callable[[str, str], None]) -> None:
    golden("compare.txt", text.page(lens_record((5, 3), notes=["A note."])) + "\n")


def test_the_rows_are_those_of_the_contract() -> None:
    lines = text.page(lens_record()).splitlines()
    assert lines[:9] == [
        "Loading: org/model1",
        "Loading: org/model2",
        "",
        "=" * 70,
        f"Prompt: '{PROMPT}'",
        "=" * 70,
        "",
        "=== Final Predictions ===",
        "Model                                    Top Token        Prob",
    ]
    assert lines[9] == "-" * 65
    record = lens_record()
    for line, model in zip(lines[10:12], models(record), strict=True):
        top = model.layers[-1].top[0]
        assert line == f"{model.info.id:<40} {top.token:<16} {top.probability:.4f}"
    assert lines[12:16] == ["", "=== Token Evolution Comparison ===", "", "Token ' Paris':"]
    paris = [model.tracked[0] for model in models(record)]
    assert paris[0].emergence_layer == 2
    assert (
        lines[16] == f"  {'org/model1':<37}: emerges at layer 2, final prob {paris[0].final_probability:.4f}"
    )
    assert lines[17] == f"  {'org/model2':<37}: never emerges, final prob {paris[1].final_probability:.4f}"
    assert lines[18:20] == ["", "Token ' London':"]


def test_the_sample_of_the_contract_is_printed_so() -> None:
    record = lens_record(targets=(3, 2), prompt="The answer is")
    page = text.body(record)
    assert "\nPrompt: 'The answer is'\n" in page
    assert re.search(r"^org/model1 {31}42 {15}0\.\d{4}$", page, re.MULTILINE)
    assert re.search(r"^org/model2 {31}: {16}0\.\d{4}$", page, re.MULTILINE)
    assert "\n\nToken '42':\n  org/model1" in page
    assert "\n\nToken ':':\n  org/model1" in page


def test_what_was_not_measured_is_said_and_not_invented() -> None:
    lines = text.page(unmeasured_record()).splitlines()
    assert f"{'org/model2':<40} {'-':<16} nan" in lines
    assert f"  {'org/model2':<37}: not known, since nothing is read at the end, final prob nan" in lines
    assert f"  {'org/model2':<37}: has no such token" in lines
    assert "First choice: not known, since not every final probability is finite" in lines
    assert "Largest difference: not measured" in lines
    assert lines[-1] == "Note: org/model2, layer 3: its logits are not finite"
    assert not any(line.startswith("First choices by layer") for line in lines)


def test_every_text_stays_on_its_line() -> None:
    record = hostile_record()
    shown = text.page(record)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u2028\u2029\u202a-\u202e\ud800-\udfff]", shown)
    assert len(shown.splitlines()) == len(text.page(lens_record()).splitlines()) + len(HOSTILE)
    assert "Prompt: '<script>window.pwned=1</script>\\n</script>" in shown


def test_a_prompt_is_quoted_as_python_quotes_it_and_a_long_one_keeps_its_end() -> None:
    said = text.body(lens_record(prompt="it's\n")).splitlines()[1]
    assert said == 'Prompt: "it\'s\\n"'
    assert text.body(lens_record(prompt="both ' and \"")).splitlines()[1] == "Prompt: 'both ' and \"'"
    assert shortened("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    long = "a" * 5000 + "the end"
    assert shortened(long) == "a" * 700 + " … 4,007 characters … " + long[-300:]


def test_the_summary_tells_where_the_two_part() -> None:
    record = lens_record((6, 3))
    js = [pair.js or 0.0 for pair in record.layers]
    most = js.index(max(js))
    there = record.layers[most]
    differ = [pair for pair in record.layers if not pair.same_first_choice]
    assert summary_lines(record) == [
        "First choice: org/model1 ends with ' Paris', org/model2 with ' London'",
        f"Largest difference: layer {most} of model 1, layer {there.model2_layer} of model 2, JS "
        f"{js[most]:.4f} nats (at most 0.6931), KL(1‖2) {there.kl_1_2:.4f}, KL(2‖1) {there.kl_2_1:.4f}",
        f"First choices by layer: differ at {len(differ)} of 6, first at layer {differ[0].layer} of model 1, "
        f"layer {differ[0].model2_layer} of model 2",
    ]


def test_two_of_the_same_part_nowhere() -> None:
    record = lens_record(targets=(2, 2))
    assert [pair.js for pair in record.layers] == [0.0] * 4
    assert summary_lines(record) == [
        "First choice: both end with ':'",
        "Largest difference: none; both lenses read the same at every layer",
        "First choices by layer: differ at 0 of 4",
    ]


def test_the_same_where_both_were_read_is_not_the_same_everywhere() -> None:
    record = lens_record(targets=(2, 2))
    *read, last = record.layers
    unread = replace(last, js=None, kl_1_2=None, kl_2_1=None, same_first_choice=None)
    record = replace(record, layers=[*read, unread])
    told = "read the same at the 3 of 4 layers that were read"
    assert told in summary_lines(record)[1]
    assert [told in answer.reason for answer in page.answers(record)] == [False, False, True]


def test_a_tracked_word_bears_its_token_where_the_two_are_one() -> None:
    record = lens_record(tracked=["Paris", "Londonderry"])
    assert title(record, 0) == " Paris"
    assert title(record, 1) == "Londonderry"
    other = replace(record.model2.tracked[0], token="Paris")
    two = replace(record, model2=replace(record.model2, tracked=[other, record.model2.tracked[1]]))
    assert title(two, 0) == "Paris"
    assert title(unmeasured_record(), 1) == " London"


def test_two_models_of_one_name_are_told_apart() -> None:
    record = lens_record()
    same = replace(record, model2=replace(record.model2, info=record.model1.info))
    assert names(same) == ("org/model1 (1)", "org/model1 (2)")
    assert names(record) == ("org/model1", "org/model2")


# Tables


def rows_of(record: CompareRecord) -> list[tuple[Any, ...]]:
    return [
        (number, model.info.id, layer.layer, rank + 1, token.token, token.token_id, token.probability)
        for number, model in ((1, record.model1), (2, record.model2))
        for layer in model.layers
        for rank, token in enumerate(layer.top)
    ]


COLUMNS = ["model", "model_id", "layer", "rank", "token", "token_id", "probability"]


@pytest.mark.parametrize("name", ["plain", "other depths", "nulls"])
def test_csv_parquet_and_pandas_hold_every_token_of_every_layer(name: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    expected = rows_of(record)
    for path in ("x.csv", "x.parquet"):
        assert Comparison(record).save(tmp_path / path) == [str(tmp_path / path)]
    with open(tmp_path / "x.csv", encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == COLUMNS
    assert rows == [["" if value is None else str(value) for value in row] for row in expected]
    stored = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert stored.column_names == COLUMNS
    assert [tuple(row.values()) for row in stored.to_pylist()] == expected
    frame = Comparison(record).to_pandas()
    assert list(frame.columns) == COLUMNS
    assert frame["token"].tolist() == [row[4] for row in expected]
    np.testing.assert_array_equal(
        frame["probability"].to_numpy(dtype=float),
        [math.nan if row[-1] is None else row[-1] for row in expected],
    )


def test_tokens_that_cannot_be_stored_are_written_out() -> None:
    record = hostile_record()
    stored = {}
    for name, write in (("csv", writer_of("compare", ".csv")), ("parquet", writer_of("compare", ".parquet"))):
        stream = io.BytesIO()
        write(record, stream)
        stored[name] = stream.getvalue()
    rows = list(csv.DictReader(io.StringIO(stored["csv"].decode(), newline="")))
    columns = pyarrow.parquet.read_table(io.BytesIO(stored["parquet"])).to_pylist()
    expected = [row[4].replace("\ud800", "\\ud800") for row in rows_of(record)]
    assert [row["token"] for row in rows] == [row["token"] for row in columns] == expected


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("name", RECORDS)
def test_markdown_has_both_tables_and_nothing_breaks_them(name: str) -> None:
    record = RECORDS[name]
    stream = io.BytesIO()
    table.write_markdown(record, stream)
    lines = stream.getvalue().decode().splitlines()
    found = [cells_of(line) for line in lines if line.startswith("| ")]
    assert [len(row) for row in found] == [3] * 3 + [4] * (1 + 2 * len(record.tracked))
    for row, model in zip(found[1:3], models(record), strict=True):
        top = model.layers[-1].top
        assert row[2] == ("nan" if not top or top[0].probability is None else f"{top[0].probability:.4f}")
    expected = [
        "" if found.token is None else "nan" if final is None else f"{final:.4f}"
        for i in range(len(record.tracked))
        for found in (model.tracked[i] for model in models(record))
        for final in [found.final_probability]
    ]
    assert [row[3] for row in found[4:]] == expected
    assert len([line for line in lines if line.startswith("- ")]) == len(summary_lines(record)) + len(
        record.notes
    )
    assert "<script>" not in re.sub(r"`+[^`]*`+|\\<", "", "\n".join(lines))


# JSON


@pytest.mark.parametrize("name", ["plain", "other depths", "nulls"])
def test_json_is_valid_and_read_back(name: str, tmp_path: Path) -> None:
    found = Comparison(RECORDS[name])
    found.save(tmp_path / "x.json")
    document = json.loads((tmp_path / "x.json").read_bytes())
    jsonschema.Draft202012Validator(json_schema("compare")).validate(document)
    again = load_result(tmp_path / "x.json")
    assert isinstance(again, Comparison)
    assert again.record == found.record
    assert str(again) == str(found)


def test_every_format_of_the_contract_is_written(tmp_path: Path) -> None:
    suffixes = [".json", ".csv", ".parquet", ".md", ".html", ".png", ".svg", ".pdf"]
    assert formats_of("compare") == suffixes
    for suffix in suffixes:
        Comparison(unmeasured_record()).save(tmp_path / f"x{suffix}")
    begins = {suffix: (tmp_path / f"x{suffix}").read_bytes()[:8] for suffix in suffixes}
    assert begins[".json"].startswith(b"{")
    assert begins[".csv"] == b"model,mo"
    assert begins[".parquet"].startswith(b"PAR1")
    assert begins[".md"].startswith(b"# `org/")
    assert begins[".html"].lower() == b"<!doctyp"
    assert begins[".png"] == b"\x89PNG\r\n\x1a\n"
    assert begins[".svg"].startswith(b"<?xml")
    assert begins[".pdf"].startswith(b"%PDF")


# The page


class Markup(HTMLParser):
    """Elements with their attributes, the cells of each table, the scripts, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[tuple[str, dict[str, str | None]]]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in, self._is_cell = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in = tag
            self.scripts += [""] if tag == "script" else []
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", dict(attrs)))
            self._is_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = ""
        elif tag in ("td", "th"):
            self._is_cell = False

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif not self._in:
            self.text += data
            if self._is_cell:
                shown, attributes = self.tables[-1][-1][-1]
                self.tables[-1][-1][-1] = (shown + data, attributes)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def html_of(record: CompareRecord) -> bytes:
    stream = io.BytesIO()
    page.write_html(record, stream)
    return stream.getvalue()


def markup_of(record: CompareRecord) -> Markup:
    return Markup(html_of(record).decode())


@pytest.mark.parametrize("name", ["plain", "other depths", "deep", "nulls"])
def test_the_lens_is_in_the_page_at_full_precision_the_last_layer_on_top(name: str) -> None:
    record = RECORDS[name]
    for shown, model in zip(markup_of(record).tables, models(record), strict=False):
        head, *rows = shown
        assert [cell[0].replace("Rank ", "") for cell in head[1:]] == [
            str(i + 1) for i in range(max(len(layer.top) for layer in model.layers))
        ]
        assert [row[0][0] for row in rows] == [str(layer.layer) for layer in reversed(model.layers)]
        for row, layer in zip(rows, reversed(model.layers), strict=True):
            if not layer.top:
                assert [cell[0] for cell in row[1:]] == ["not finite"]
                continue
            for (_, attributes), token in zip(row[1:], layer.top, strict=True):
                exact = "" if token.probability is None else repr(token.probability)
                assert attributes["data-value"] == exact
                assert exact in str(attributes["title"])
                assert f"id {token.token_id}" in str(attributes["title"])
                assert attributes["style"] == f"--share: {100 * (token.probability or 0):.1f}%"


def test_the_cells_of_the_final_token_are_outlined() -> None:
    record = lens_record()
    for shown, model in zip(markup_of(record).tables, models(record), strict=False):
        final = model.layers[-1].top[0].token_id
        outlined = [[cell[1].get("class") == "final" for cell in row[1:]] for row in shown[1:]]
        assert outlined == [[t.token_id == final for t in layer.top] for layer in reversed(model.layers)]


def test_the_tables_of_tracking_and_distance_are_the_numbers_of_the_result() -> None:
    record = lens_record((6, 3))
    found = markup_of(record).tables
    emergences, one, other, distances = found[2:6]
    final = record.model1.tracked[0].final_probability
    said = [cell[0] for cell in emergences[1]][:5]
    assert said == ["' Paris'", "org/model1", "' Paris'", "emerges at layer 3", f"{final:.4f}"]
    assert len(emergences) == 1 + 4
    for shown, model in ((one, record.model1), (other, record.model2)):
        for i, row in enumerate(shown[1:]):
            for (shown_here, attributes), tracked in zip(row[1:], model.tracked, strict=True):
                assert attributes["data-value"] == repr(tracked.probability[i])
                assert shown_here == f"{tracked.probability[i]:.4f} ({tracked.rank[i]})"
    fields = ["model2_layer", "kl_1_2", "kl_2_1", "js"]
    for row, pair in zip(distances[1:], record.layers, strict=True):
        assert row[0][0] == str(pair.layer)
        assert [cell[1]["data-value"] for cell in row[1:5]] == [repr(getattr(pair, f)) for f in fields]
        assert row[5][0] == ("yes" if pair.same_first_choice else "no")


@pytest.mark.parametrize(
    ("name", "headline", "style"),
    [
        ("plain", "They end with different tokens: ' Paris' and ' London'.", "verdict changed"),
        ("the same", "Both end with ':'.", "verdict identical"),
        ("nulls", "Not known: the final probabilities of a model are not finite.", "verdict none"),
    ],
)
def test_the_headline_is_whether_both_end_with_the_same_token(name: str, headline: str, style: str) -> None:
    markup = markup_of(RECORDS[name])
    assert headline in markup.text
    assert [a["class"] for tag, a in markup.elements if "verdict" in str(a.get("class"))] == [style]


def test_the_answers_are_the_numbers_of_the_result() -> None:
    record = lens_record((6, 3))
    sure, when, where = page.answers(record)
    one, other = (model.layers[-1].top[0].probability for model in models(record))
    assert sure.answer == f"{one:.4f} | {other:.4f}"
    assert when.answer == "layer 3 | layer 1"
    assert where.answer == f"Layer {record.summary.most_divergent_layer}"
    assert f"{record.summary.max_js:.4f}" in where.reason
    assert [answer.answer for answer in page.answers(unmeasured_record())] == [
        f"{unmeasured_record().model1.layers[-1].top[0].probability:.4f} | –",
        "layer 2 | –",
        "Not known",
    ]
    assert page.answers(RECORDS["the same"])[2].answer == "Nowhere"


def test_the_page_says_what_the_text_says_and_all_that_repeats_the_run() -> None:
    record = replace(
        lens_record(notes=["A note."]), model2=replace(lens_record().model2, rendered="<user>Hi")
    )
    said = " ".join(markup_of(record).text.split())
    for line in summary_lines(record):
        assert line.partition(": ")[2] in said
    for name in (*record.settings.__struct_fields__, *record.environment.__struct_fields__):
        assert name.replace("_", " ") in said
    for metric in LENS_METRICS.values():
        assert metric.formula in said
        assert metric.source in said
    assert "A note." in said
    assert f"'{PROMPT}'" in said
    assert "'<user>Hi'" in said
    assert "nostalgebraist 2020" in said


def test_equal_results_give_equal_bytes() -> None:
    assert html_of(lens_record()) == html_of(lens_record())
    assert len(html_of(RECORDS["deep"])) < 1_000_000


def test_texts_are_text_wherever_they_stand() -> None:
    plain, hostile = (markup_of(record) for record in (lens_record((5, 3)), hostile_record()))
    assert hostile.scripts == plain.scripts
    assert hostile.count("img") == plain.count("img") == 0
    for said in (
        HOSTILE[0],
        HOSTILE[2],
        "{{ 7 * 7 }}",
        "\\u202eright",
        "NUL \\x00 escape",
        "half \\ud800 of one",
    ):
        assert said in hostile.text
    assert "\u202e" not in hostile.text
    assert not [name for _, attributes in hostile.elements for name in attributes if name.startswith("on")]


def test_the_policy_lets_one_script_run_and_nothing_else() -> None:
    markup = markup_of(lens_record())
    (policy,) = [str(a["content"]) for _, a in markup.elements if "http-equiv" in a]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    data, code = markup.scripts
    assert data.strip() == "{}"
    assert rules["script-src"] == assets.csp_hash(code)
    assert rules["default-src"] == "'none'"
    assert "plotly" not in code.lower()
    assert not [
        a for _, a in markup.elements if "src" in a or not str(a.get("href", "#")).startswith(("#", "data:"))
    ]


def test_what_is_not_there_has_no_section() -> None:
    ids = {a.get("id") for tag, a in markup_of(RECORDS["nothing tracked"]).elements if tag == "section"}
    assert {"lenses", "distance", "provenance", "reading"} <= ids
    assert "tracked" not in ids
    assert "tracked" in {a.get("id") for _, a in markup_of(lens_record()).elements}


def test_more_tracked_tokens_than_there_is_room_for_are_counted() -> None:
    record = lens_record()
    many = 30
    one, other = (replace(m, tracked=[m.tracked[0]] * many) for m in models(record))
    big = replace(record, model1=one, model2=other, tracked=[" Paris"] * many)
    markup = markup_of(big)
    assert f"The first {page.MOST_PLOTS} of {many} tokens are drawn." in markup.text
    assert len(page.tracked_plots(big)) == page.MOST_PLOTS
    assert len(markup.tables[2]) == 1 + 2 * many


# The plots of the page


def test_a_curve_stands_where_its_values_are() -> None:
    line = plots.Line("a", "one", [0.0, 0.5, None, 1.0])
    drawn = plots.plot("told", [line])
    left, right, top, bottom = 58.0, 340 - 12.0, 10.0, 170 - 34.0
    third = (right - left) / 3
    (curve,) = drawn.curves
    assert curve.stretches == [
        f"{left:.1f},{bottom:.1f} {left + third:.1f},{(top + bottom) / 2:.1f}",
        f"{right:.1f},{top:.1f}",
    ]
    assert [point.told for point in curve.points] == ["a, layer 0: 0", "a, layer 1: 0.5", "a, layer 3: 1"]
    assert [(tick.text, tick.place) for tick in drawn.y_ticks] == [
        ("0", bottom), ("0.5", (top + bottom) / 2), ("1", top)
    ]  # fmt: skip
    assert [tick.text for tick in drawn.x_ticks] == ["0", "1", "2", "3"]


def test_curves_of_other_depths_share_the_relative_depth() -> None:
    drawn = plots.plot("", [plots.Line("a", "one", [0.1, 0.2]), plots.Line("b", "two", [0.1, 0.1, 0.1])])
    assert [(c.points[0].x, c.points[-1].x) for c in drawn.curves] == [(58.0, 328.0)] * 2
    assert drawn.x_label == "Relative depth"
    assert [tick.text for tick in drawn.x_ticks] == ["first layer", "last layer"]


def test_a_plot_of_nothing_or_of_zeros_is_still_a_plot() -> None:
    nothing = plots.plot("", [plots.Line("a", "one", [None, None])])
    assert nothing.curves[0].stretches == []
    assert nothing.curves[0].points == []
    zeros = plots.plot("", [plots.Line("a", "one", [0.0])])
    assert [point.y for point in zeros.curves[0].points] == [136.0]
    deep = plots.plot("", [plots.Line("a", "one", [None, 0.5, None] + [0.1] * 77)])
    assert [point.told for point in deep.curves[0].points] == ["a, layer 1: 0.5"], "alone it would be unseen"


# The figure


def composed(record: CompareRecord) -> Figure:
    drawn = Figure(figsize=figure.figure_size(record), layout="constrained")
    figure.compose(record, drawn)
    drawn.draw_without_rendering()
    return drawn


def drawing_of(record: CompareRecord, kind: Kind) -> bytes:
    stream = io.BytesIO()
    figure.write_figure(record, stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["plain", "other depths", "deep", "nulls"])
def test_the_cells_of_the_figure_are_the_probabilities_and_tokens(name: str) -> None:
    record = RECORDS[name]
    for axes, model in zip(composed(record).axes, models(record), strict=False):
        (image,) = axes.get_images()
        assert image.origin == "lower"
        drawn: Any = np.ma.filled(np.ma.asarray(image.get_array()), np.nan)
        n_ranks = min(figure.MOST_RANKS, max(len(layer.top) for layer in model.layers))
        assert drawn.shape == (len(model.layers), n_ranks)
        texts = {t.get_gid(): t for t in axes.texts}
        for layer in model.layers:
            row = [t.probability for t in layer.top[:n_ranks]] or [None] * n_ranks
            np.testing.assert_array_equal(drawn[layer.layer], np.array(row, dtype=float))
            for rank, token in enumerate(layer.top[:n_ranks]):
                found = texts.pop(f"token-{layer.layer}-{rank + 1}")
                assert found.get_position() == (rank, layer.layer)
                if token.token in (" Paris", ":", "\n"):
                    assert found.get_text() == token.token.replace("\n", "\\n").replace(" ", "␣")
        assert texts == {}
        n_kept = max(len(layer.top) for layer in model.layers)
        left_out = f" (the first {n_ranks} of {n_kept})" if n_kept > figure.MOST_RANKS else ""
        assert axes.get_xlabel() == f"Rank{left_out}"


def test_the_final_token_is_outlined_in_the_figure() -> None:
    record = lens_record()
    for axes, model in zip(composed(record).axes, models(record), strict=False):
        final = model.layers[-1].top[0].token_id
        expected = {
            (rank - 0.5, layer.layer - 0.5)
            for layer in model.layers
            for rank, token in enumerate(layer.top)
            if token.token_id == final
        }
        boxes = [box for box in axes.patches if isinstance(box, Rectangle)]
        assert {box.get_xy() for box in boxes} == expected


def test_a_token_is_white_where_its_cell_is_dark() -> None:
    record = lens_record()
    sure = replace(record.model1.layers[-1].top[0], probability=0.9)
    last = replace(record.model1.layers[-1], top=[sure, *record.model1.layers[-1].top[1:]])
    layers = [*record.model1.layers[:-1], last]
    axes = composed(replace(record, model1=replace(record.model1, layers=layers))).axes[0]
    colours = {t.get_gid(): t.get_color() for t in axes.texts}
    assert colours["token-3-1"] == "white"
    assert colours["token-3-2"] == "black"


@pytest.mark.parametrize("name", RECORDS)
def test_every_figure_is_drawn_and_the_same_each_time(name: str) -> None:
    record = RECORDS[name]
    svg = drawing_of(record, "svg")
    assert svg == drawing_of(record, "svg")
    root = ElementTree.fromstring(svg)
    assert root.get("width") == "489.6pt", "6.8 inches"
    assert not re.search("<script|<image [^>]*http", svg.decode())


def test_a_picture_is_large_enough_for_print_and_has_no_date() -> None:
    record = hostile_record()
    png = drawing_of(record, "png")
    assert png == drawing_of(record, "png")
    shot = Image.open(io.BytesIO(png))
    assert shot.width == 2040
    pdf = drawing_of(record, "pdf")
    assert pdf[:5] == b"%PDF-"
    assert b"CreationDate" not in pdf
    assert figure.figure_size(RECORDS["deep"])[1] == figure.MOST_HEIGHT_INCHES


# The notebook


@pytest.mark.parametrize("name", RECORDS)
def test_a_notebook_shows_the_lens_as_text(name: str) -> None:
    record = RECORDS[name]
    shown = Comparison(record)._repr_html_()
    markup = Markup(shown)
    assert markup.scripts == []
    assert markup.count("img") == 0
    for line in summary_lines(record):
        assert line in markup.text
    for shown_table, model in zip(markup.tables, models(record), strict=False):
        assert len(shown_table) == len(model.layers)
        exact = [token.probability for token in model.layers[0].top]
        titles = [str(attributes["title"]) for _, attributes in shown_table[-1][1:]]
        assert all(
            f"probability {'not finite' if p is None else repr(p)}," in t
            for p, t in zip(exact, titles, strict=True)
        )
    assert len(markup.tables) == (3 if record.tracked else 2)


def test_the_face_tells_what_it_is() -> None:
    found = Comparison(lens_record())
    assert repr(found) == f"<Comparison org/model1 | org/model2: {len(PROMPT)} characters, 4 layers>"
    assert [model.info.id for model in found.models] == ["org/model1", "org/model2"]
    assert found.summary.same_first_choice is False
