"""weight-diff as text, tables, figure and notebook: every format holds the record's own numbers."""

from __future__ import annotations

import csv
import html as html_module
import io
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from factories import save_model, tiny_llama
from lazarus.cli import app
from lazarus.errors import GateNotMetError
from lazarus.render.weights import table, text
from lazarus.render.weights.figure import Map, write_figure
from lazarus.render.weights.grid import Grid, pooled_change
from lazarus.render.weights.summary import MOST_LINES, summary_lines
from lazarus.result_classes import WeightDiff
from lazarus.results import (
    NotCompared,
    Quantisation,
    Spectrum,
    TensorRecord,
    UnmatchedTensor,
    WeightDiffRecord,
    json_schema,
)
from lazarus.results.weight_glossary import WEIGHT_METRICS
from made_records import HOSTILE
from made_weights import checkpoint, expert_record, record_of, spectrum, summary, tensor, whole_record

ONLY_BASE = UnmatchedTensor(layer=None, component="a", name="a.w", base_shape=[2, 3], finetuned_shape=None)


def lines_of(record: WeightDiffRecord) -> list[str]:
    return text.page(record).split("\n")


def rows_of(record: WeightDiffRecord) -> list[str]:
    lines = lines_of(record)
    begin = lines.index(text.RULE) + 1
    return lines[begin : lines.index("", begin)]


def saved(record: WeightDiffRecord, path: Path) -> Path:
    assert WeightDiff(record).save(path) == [str(path)]
    return path


# --- Text


def test_the_page_is_the_known_one(golden: Callable[[str, str], None]) -> None:
    golden("weight-diff.txt", text.page(whole_record(3)) + "\n")


def test_the_lines_are_those_of_the_contract() -> None:
    rows = [tensor(None, "embed", 0.003992), tensor(11, "mlp_down", 0.145678), tensor(11, "attn_o", 0.000089)]
    record = record_of(rows)
    assert text.page(record).startswith(
        "Loading base model: org/base\n"
        "Loading fine-tuned model: org/finetuned\n"
        "Detected model family: llama\n"
        "\n"
        "Comparing 1 layer...\n"
        "\n"
        "Layer    Component    Rel. Diff\n"
        "-----------------------------------\n"
        "-        embed           0.003992\n"
        "11       mlp_down        0.145678 ***\n"
        "11       attn_o          0.000089\n"
        "\n"
        "Top 5 divergent components:\n"
        "  Layer 11 mlp_down: 0.145678\n"
        "  embed: 0.003992\n"
        "  Layer 11 attn_o: 0.000089\n"
        "\n"
        "Verdict: changed: 3 of 3 tensors differ, relative change "
    )
    assert text.detected(("gemma3", "llama"), 26) == (
        "Detected model family: gemma3 (base), llama (fine-tuned)\n\nComparing 26 layers..."
    )


def test_a_run_and_its_saved_result_count_the_layers_of_the_deeper_model(tmp_path: Path) -> None:
    names = [str(save_model(tmp_path / f"{n}-layers", tiny_llama(num_hidden_layers=n))) for n in (4, 6)]
    for base, finetuned in (names, names[::-1]):
        to = str(tmp_path / "diff.json")
        run = ["introspect", "weight-diff", "-b", base, "-f", finetuned, "-o", to]
        done, shown = (CliRunner().invoke(app, arguments) for arguments in (run, ["show", to]))
        assert (done.exit_code, shown.exit_code) == (0, 0)
        assert "\n\nComparing 6 layers...\n\n" in done.stdout
        assert done.stdout == f"{shown.stdout}Results saved to: {to}\n"


def test_the_mark_follows_the_unrounded_value() -> None:
    rows = rows_of(record_of([tensor(0, "attn_q", 0.10000001), tensor(0, "attn_k", 0.1)]))
    assert rows == ["0        attn_q          0.100000 ***", "0        attn_k          0.100000"]


def test_a_long_component_does_not_run_into_the_number() -> None:
    (row,) = rows_of(record_of([tensor(3, "expert_127.mlp_down", 0.25)]))
    assert row.split() == ["3", "expert_127.mlp_down", "0.250000", "***"]


def test_a_change_that_prints_as_zero_is_counted() -> None:
    rows = [tensor(0, "attn_q", 4e-7), tensor(0, "attn_k", 5.1e-7), tensor(0, "attn_v", 0.0)]
    record = record_of(rows)
    assert [row.split()[2] for row in rows_of(record)] == ["0.000000", "0.000001", "0.000000"]
    assert "Changed nonetheless, though printed as 0.000000: 1 row" in lines_of(record)


def test_a_row_without_a_relative_change_prints_nan_and_says_why() -> None:
    zero = tensor(0, "attn_q.bias", None, [4], base_norm=0.0)
    record = record_of([tensor(0, "attn_q", 0.2), zero, tensor(1, "attn_k", None)])
    assert [row.split()[2] for row in rows_of(record)] == ["0.200000", "nan", "nan"]
    told = [line for line in lines_of(record) if line.startswith("Without a relative change")]
    assert told == [
        "Without a relative change, printed as nan: 2 tensors (base is all zero in 1, not finite in 1): "
        "layer 0 attn_q.bias, layer 1 attn_k"
    ]
    assert "changed: 3 of 3 tensors differ" in text.verdict(record)


def test_identical_says_so_and_why() -> None:
    rows = [tensor(0, "attn_q", 0.0), tensor(None, "embed", 0.0)]
    found = msgspec.structs.replace(summary(rows), causes=["both name one <folder>\x1b"])
    record = record_of(rows, summary=found)
    lines = lines_of(record)
    assert lines[-4:] == [
        "Top 5 divergent components:",
        "  none: nothing differs",
        "",
        "Verdict: IDENTICAL, nothing changed: all 2 tensors have the same bits. Likely cause: both name one "
        "<folder>\\x1b",
    ]


@pytest.mark.parametrize(
    ("rows", "unmatched", "said", "top"),
    [
        ([], [], "IDENTICAL, nothing changed: there is no tensor to compare", "nothing differs"),
        (
            [],
            [ONLY_BASE],
            "changed: no tensor is in both, but 1 tensor has no counterpart of the same shape",
            "nothing differs in what both have",
        ),
        (
            [tensor(0, "attn_q", 0.0)],
            [ONLY_BASE, ONLY_BASE],
            "changed: the one tensor has the same bits, but 2 tensors have no counterpart of the same shape",
            "nothing differs in what both have",
        ),
        (
            [tensor(0, "attn_q", None)],
            [],
            "changed: 1 of 1 tensor differs",
            "what changed has no relative change",
        ),
    ],
)
def test_edges_have_a_verdict(rows: Any, unmatched: Any, said: str, top: str) -> None:
    record = record_of(rows, unmatched=unmatched)
    assert text.verdict(record) == said
    assert f"  none: {top}" in lines_of(record)
    assert record.summary.verdict == said.split()[0].strip(",:").lower()


def rounded(**changes: Any) -> WeightDiffRecord:
    """A result whose verdict is that all of the change is rounding."""
    rows = [tensor(0, "attn_q", 1e-3, rounding=True, merged_share=1.0), tensor(0, "attn_k", 0.0)]
    causes = ["fine-tuned is base rounded to <bfloat16>"]
    found = msgspec.structs.replace(summary(rows), verdict="rounding", causes=causes)
    return record_of(rows, summary=found, **changes)


def test_rounding_says_so_and_of_what(tmp_path: Path) -> None:
    record = rounded()
    said = "rounding: 1 of 2 tensors differs, by rounding alone: fine-tuned is base rounded to <bfloat16>"
    assert text.verdict(record) == f"{said} (accepted by --expect identical)"
    assert "rounded to &lt;bfloat16&gt;" in saved(record, tmp_path / "x.html").read_text(encoding="utf-8")
    frame = parquet.read_table(saved(record, tmp_path / "x.parquet"))
    assert frame["rounding"].to_pylist() == [True, None]
    assert frame["merged_share"].to_pylist() == [1.0, None]
    header, first, second = saved(record, tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()
    assert header.split(",").count("rounding") == 1
    assert ("true" in first, "true" in second) == (True, False)


def test_rounding_claims_no_more_than_was_compared() -> None:
    parts = [NotCompared(what="score head (score)", n_tensors=1, differs=None)]
    base = msgspec.structs.replace(checkpoint("org/base", 1, 2), not_compared=parts)
    record = rounded(base=base)
    assert text.verdict(record).startswith("rounding in what was compared: 1 of 2 tensors differs")
    assert "score head" in text.verdict(record)
    with pytest.raises(GateNotMetError, match="`only_compared=True`"):
        WeightDiff(record).check_gates(expect="identical")
    WeightDiff(record).check_gates(expect="identical", only_compared=True)


@pytest.mark.parametrize(
    ("unmatched", "n_moved", "said"),
    [
        ([], 1, "all 2 tensors have the same bits, but 1 token has another id"),
        (
            [ONLY_BASE],
            3,
            "all 2 tensors have the same bits, but 3 tokens have another id and 1 tensor has no counterpart "
            "of the same shape",
        ),
    ],
)
def test_tokens_that_moved_are_a_change(unmatched: list[UnmatchedTensor], n_moved: int, said: str) -> None:
    rows = [tensor(0, "attn_q", 0.0), tensor(None, "embed", 0.0)]
    found = msgspec.structs.replace(summary(rows, unmatched), verdict="changed", n_moved_tokens=n_moved)
    assert text.verdict(record_of(rows, unmatched=unmatched, summary=found)) == f"changed: {said}"


def test_unmatched_tensors_are_named_with_what_they_lack() -> None:
    others = [
        msgspec.structs.replace(ONLY_BASE, name="b.w", base_shape=None, finetuned_shape=[4]),
        msgspec.structs.replace(ONLY_BASE, name="c.w", finetuned_shape=[2, 4]),
        msgspec.structs.replace(ONLY_BASE, name="d.w"),
    ]
    record = record_of([tensor(0, "attn_q", 0.5)], unmatched=[ONLY_BASE, *others])
    assert (
        "Not compared in full: 4 tensors have no counterpart of the same shape: a.w (only in base), "
        "b.w (only in fine-tuned), c.w (2x3 in base, 2x4 in fine-tuned) and 1 more"
    ) in lines_of(record)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([8], "the one changed matrix looks like a low-rank adapter's, rank 8"),
        ([None], "the one changed matrix does not look like a low-rank adapter's"),
        ([8, 8, 8], "all 3 changed matrices look like a low-rank adapter's, rank 8"),
        ([8, 4, None], "2 of 3 changed matrices look like a low-rank adapter's, ranks 4 to 8"),
        ([8, None], "1 of 2 changed matrices looks like a low-rank adapter's, rank 8"),
        ([None, None], "none of the 2 changed matrices looks like a low-rank adapter's"),
    ],
)
def test_the_update_is_told_from_the_spectra(ranks: list[int | None], said: str) -> None:
    rows = [tensor(i, "attn_q", 0.1, spectrum=spectrum(64, rank)) for i, rank in enumerate(ranks)]
    (line,) = [line for line in summary_lines(record_of(rows)) if line.startswith("Update: ")]
    found = [spectrum(64, rank) for rank in ranks]
    effective = statistics.median(s.effective_rank or 0.0 for s in found)
    ninety = statistics.median(s.rank_90 or 0 for s in found)
    assert line == (
        f"Update: {said}; median effective rank {effective:.1f}; "
        f"90 % of the change in rank {ninety:g} (median)"
    )


@pytest.mark.parametrize("record", [whole_record(), expert_record(2, 4), record_of([])])
def test_the_summary_has_at_most_eight_lines(record: WeightDiffRecord) -> None:
    assert 1 <= len(summary_lines(record)) <= MOST_LINES


def test_hostile_names_stay_on_their_line() -> None:
    rows = [tensor(i, f"{name}/权重", 0.1, name=name * 40) for i, name in enumerate(HOSTILE)]
    unmatched = [msgspec.structs.replace(ONLY_BASE, name=name) for name in HOSTILE]
    notes = list(HOSTILE)
    info = msgspec.structs.replace(checkpoint(HOSTILE[6], 7, 7), family=HOSTILE[6])
    page = text.page(record_of(rows, unmatched=unmatched, notes=notes, base=info))
    assert not re.search("[\x00-\x09\x0b-\x1f\u2028\u2029\u202e]", page)
    assert page.count("Note: ") == len(HOSTILE)
    assert len(rows_of(record_of(rows))) == len(HOSTILE)


# --- Tables


def test_csv_holds_every_field_of_every_tensor(tmp_path: Path) -> None:
    record = whole_record()
    path = saved(record, tmp_path / "x.csv")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(record.results)
    for ours, row in zip(record.results, rows, strict=True):
        assert row["shape"] == "x".join(map(str, ours.shape))
        assert row["flagged"] == ("true" if ours.flagged else "false")
        _same(ours, {name: value or None for name, value in row.items()})


def test_parquet_holds_the_same_with_types(tmp_path: Path) -> None:
    record = whole_record()
    frame = parquet.read_table(saved(record, tmp_path / "x.parquet"))
    assert str(frame.schema.field("layer").type) == "int64"
    assert str(frame.schema.field("flagged").type) == "bool"
    assert str(frame.schema.field("spectrum_adapter_rank").type) == "int64"
    rows = frame.to_pylist()
    assert list(rows[0]) == list(table.columns(record))
    for ours, row in zip(record.results, rows, strict=True):
        assert row["flagged"] is ours.flagged
        _same(ours, row)


def _same(ours: TensorRecord, row: dict[str, Any]) -> None:
    """Every number, bit for bit; null where there is none."""
    for name in (*WEIGHT_METRICS, "layer", "n_changed"):
        parts = {"": TensorRecord, "spectrum_": Spectrum, "quantisation_": Quantisation}
        before = next(start for start, kind in parts.items() if name in kind.__struct_fields__)
        wanted = getattr(getattr(ours, before.rstrip("_")) if before else ours, name, None)
        found = row[before + name]
        assert (found is None) == (wanted is None), name
        assert wanted is None or float(found) == wanted, name
    for name in ("component", "name", "base_dtype", "finetuned_dtype"):
        assert row[name] == getattr(ours, name)
    assert row["spectrum_method"] == (ours.spectrum.method if ours.spectrum else None)


def test_every_field_has_a_column() -> None:
    plain = set(TensorRecord.__struct_fields__) - {"spectrum", "quantisation"}
    of_spectrum = {f"spectrum_{name}" for name in Spectrum.__struct_fields__} - {"spectrum_singular_values"}
    of_quantisation = {f"quantisation_{name}" for name in Quantisation.__struct_fields__}
    assert set(table.columns(whole_record())) == plain | of_spectrum | of_quantisation


def test_tables_of_nothing_have_their_columns(tmp_path: Path) -> None:
    record = record_of([])
    assert parquet.read_table(saved(record, tmp_path / "x.parquet")).num_rows == 0
    assert saved(record, tmp_path / "x.csv").read_text().strip() == ",".join(table.columns(record))


def test_half_a_surrogate_stops_no_format(tmp_path: Path) -> None:
    record = record_of([tensor(0, "half \ud800", 0.1, name="\udfff")], notes=["a note \ud800"])
    for suffix in ("csv", "parquet", "md", "html", "svg"):
        assert saved(record, tmp_path / f"x.{suffix}").stat().st_size > 100


def test_pandas_has_the_columns_of_the_csv() -> None:
    record = whole_record()
    frame = WeightDiff(record).to_pandas()
    assert list(frame.columns) == list(table.columns(record))
    assert frame["layer"].isna().sum() == 3
    assert frame["layer"].max() == 11
    wanted = [math.nan if row.relative_change is None else row.relative_change for row in record.results]
    np.testing.assert_array_equal(frame["relative_change"].to_numpy(), wanted)
    assert len(WeightDiff(record_of([])).to_pandas()) == 0


def test_json_is_read_back_and_is_of_the_schema(tmp_path: Path) -> None:
    record = whole_record()
    path = saved(record, tmp_path / "x.json")
    assert WeightDiff.load(path).record == record
    jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), json_schema("weight-diff"))


def markdown(record: WeightDiffRecord) -> list[str]:
    stream = io.BytesIO()
    table.write_markdown(record, stream)
    return stream.getvalue().decode().split("\n")


def test_markdown_holds_the_table_the_summary_and_the_notes() -> None:
    record = whole_record()
    lines = markdown(record)
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == len(record.results)
    assert rows[0].startswith("| - | `embed` | 0.003990 | 0.999992 |")
    assert sum("***" in row for row in rows) == record.summary.n_flagged_tensors == 1
    assert any("3.0e-08" in row for row in rows), "a change that is not 0 is not shown as 0"
    assert "- 2 tensors \\<b\\>have no counterpart\\</b\\>" in lines
    assert any(line.startswith("- Verdict: changed: 87 of 111 tensors differ") for line in lines)


def test_markdown_of_many_tensors_keeps_the_most_changed_and_says_so() -> None:
    record = expert_record(4, 64)
    lines = markdown(record)
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == table.MOST_MARKDOWN_ROWS
    assert len("\n".join(lines)) < 65_536
    left = len(record.results) - len(rows)
    assert f"The {len(rows)} most changed of them; the other {left} are in the JSON." in lines
    shown = sorted((float(row.split(" | ")[2]) for row in rows), reverse=True)
    ours = sorted((row.relative_change or 0.0 for row in record.results), reverse=True)[: len(rows)]
    np.testing.assert_allclose(shown, ours, atol=6e-7)


def test_markdown_cells_stay_cells() -> None:
    lines = markdown(record_of([tensor(0, "a|b`c", 0.1)]))
    (row,) = [line for line in lines if line.startswith("| 0")]
    assert "| `a`&#124;`` b`c `` |" in row


# --- The grid and the figure


def test_the_grid_has_each_tensor_in_its_place() -> None:
    record = whole_record()
    grid = Grid.of(record)
    assert list(grid.layers) == list(range(12))
    assert list(grid.components)[:3] == ["attn_norm", "attn_q", "attn_k"]
    values = grid.changes(record)
    for row in record.results:
        if row.layer is not None:
            found = values[grid.components.index(row.component), row.layer]
            assert found == row.relative_change or (row.relative_change is None and math.isnan(found))


def test_a_layer_without_a_component_has_a_gap() -> None:
    record = record_of([tensor(0, "attn_q", 0.1), tensor(2, "ssm", 0.2)])
    grid = Grid.of(record)
    assert (list(grid.components), list(grid.layers)) == (["attn_q", "ssm"], [0, 2])
    np.testing.assert_array_equal(grid.changes(record), [[0.1, np.nan], [np.nan, 0.2]])


def test_pooled_is_the_change_of_all_as_one() -> None:
    random = np.random.default_rng(0)
    bases, changes = random.normal(size=(3, 5)), random.normal(size=(3, 5))
    rows = [
        tensor(0, "x", 0.1, base_norm=float(np.linalg.norm(b)), change_norm=float(np.linalg.norm(c)))
        for b, c in zip(bases, changes, strict=True)
    ]
    wanted = np.linalg.norm(changes.ravel()) / np.linalg.norm(bases.ravel())
    assert pooled_change(rows) == pytest.approx(wanted, rel=1e-14)
    assert pooled_change([]) is None
    assert pooled_change([tensor(0, "x", None)]) is None
    same = tensor(0, "x", 0.0, base_norm=None)
    assert pooled_change([*rows, same]) == pooled_change(rows), "its norm need not be known"


def test_experts_are_one_where_there_are_many() -> None:
    record = expert_record(3, 32)
    shown = Map.of(record)
    assert "of the experts of a layer the most changed one" in shown.told
    assert shown.inside.names[-3:] == ["experts.mlp_gate", "experts.mlp_up", "experts.mlp_down"]
    rows = [r for r in record.results if r.layer == 2 and r.component.endswith("mlp_up")]
    assert len(rows) == 32
    most = max(r.relative_change or 0.0 for r in rows)
    assert shown.inside.values[shown.inside.names.index("experts.mlp_up"), 2] == most
    assert Map.of(expert_record(3, 4)).told == []


EDGES = {
    "whole": whole_record(),
    "nothing": record_of([]),
    "one": record_of([tensor(0, "attn_q", 0.2)]),
    "zeros": record_of([tensor(0, "attn_q", 0.0), tensor(None, "embed", 0.0)]),
    "nan": record_of([tensor(0, "attn_q", None)]),
    "outside": record_of([tensor(None, f"part_{i}", 0.01 * i) for i in range(12)]),
    "names": record_of([tensor(0, name, 0.1) for name in (*HOSTILE, "权重" * 30, "$x^2$")]),
    "many": record_of([tensor(0, f"part_{i}", 0.01 * i) for i in range(60)]),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "svg") for name in EDGES), ("whole", "png"), ("names", "pdf")]
)
def test_figures_are_drawn_and_equal_for_equal_results(name: str, kind: Any) -> None:
    streams = io.BytesIO(), io.BytesIO()
    for stream in streams:
        write_figure(EDGES[name], stream, kind)
    assert streams[0].getvalue() == streams[1].getvalue()
    assert streams[0].getvalue()[:4] == {"png": b"\x89PNG", "svg": b"<?xm", "pdf": b"%PDF"}[kind]


def svg(record: WeightDiffRecord) -> str:
    stream = io.BytesIO()
    write_figure(record, stream, "svg")
    return stream.getvalue().decode()


def test_the_figure_says_what_it_shows() -> None:
    drawn = svg(whole_record())
    for said in ("org/base → org/finetuned", "mlp_down", "embed", "above the threshold 0.1", "exactly 0"):
        assert f">{said}<" in drawn
    assert "no number" in drawn
    assert ">above the threshold 0.1 (none)<" in svg(EDGES["zeros"])
    assert "of the experts of a layer the most changed one" in svg(expert_record(2, 32))
    assert "the 8 most changed of 12" in svg(EDGES["outside"])
    assert "the 40 most changed of 60 components" in svg(EDGES["many"])


def test_plots_are_drawn_on_axes_of_ones_own() -> None:
    from matplotlib import pyplot

    diff = WeightDiff(whole_record())
    axes = diff.plot()
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["attn_norm", "attn_q"]
    mesh: Any = axes.collections[0]
    drawn = np.ma.filled(mesh.get_array(), np.nan)
    wanted = Grid.of(diff.record).changes(diff.record)
    np.testing.assert_array_equal(np.where(wanted == 0, 0, drawn), wanted)
    (marks,) = [c for c in axes.collections if c.get_gid() == "above"]
    assert np.asarray(marks.get_offsets()).tolist() == [[11.5, 8.5]]
    _, own = pyplot.subplots()
    assert diff.heatmap(own) is own
    assert WeightDiff(record_of([])).heatmap(own) is own
    pyplot.close("all")


# --- The notebook


def test_the_notebook_shows_the_most_changed_first_and_all_digits() -> None:
    record = whole_record()
    html = WeightDiff(record)._repr_html_()
    rows = re.findall(r'<th scope="row">(.*?)</th><td(?: title="(.*?)")?>(.*?)</td>', html)
    assert rows[:2] == [("layer 1 attn_norm", "", "–"), ("layer 11 mlp_down", "0.13125", "0.131250")]
    values = [float(exact) for _, exact, _ in rows[1:]]
    assert values == sorted(r.relative_change for r in record.results if r.relative_change is not None)[::-1]
    assert "&lt;b&gt;have no counterpart" in html
    assert "<script" not in html
    assert "111 tensors, the most changed first; *** marks a relative change above 0.1" in html
    assert "Relative change of each component at each layer" in html


def test_the_notebook_of_many_tensors_stays_small() -> None:
    html = WeightDiff(expert_record(8, 64))._repr_html_()
    assert html.count("<tr>") == 201
    assert "200 of them" in html


@pytest.mark.parametrize("name", EDGES)
def test_the_notebook_shows_every_edge(name: str) -> None:
    html = WeightDiff(EDGES[name])._repr_html_()
    assert "<script" not in html
    assert f"Verdict: {html_module.escape(text.verdict(EDGES[name]))}" in html.replace("&#39;", "&#x27;")
