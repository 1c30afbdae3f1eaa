"""Records, their JSON, their schema, and files that are whole or not there."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import jsonschema
import numpy as np
import pytest

import lazarus
from lazarus.errors import ResultFileError, SaveError
from lazarus.render import save
from lazarus.render.base.escape import escaped
from lazarus.results import (
    LENS_METRICS,
    METRICS,
    WEIGHT_METRICS,
    Measures,
    Metric,
    Output,
    Readout,
    ResultRow,
    ResultRows,
    Spectrum,
    TensorRecord,
    json_schema,
    read_json,
    write_json,
)
from lazarus.results.lens import LensPair
from made_lens import lens_record
from made_records import divergences, record_of
from made_weights import whole_record

MEASURES = {"noise_floor", "normalized_divergence", "relative_l2", "norm_ratio", "interval", "local"}
FOUND = {"verdict", "onset_layer", "most_changed_block", "max_divergence", "first_flagged_layer"}
MODEL = {"id", "revision", "kind", "architecture", "n_layers", "hidden_size", "stored_dtype", "run_dtype"}
FIELDS = {"layers": MEASURES, "sites": MEASURES, "summary": FOUND}


@pytest.fixture(scope="module")
def diff(base_folder: Path, finetuned_folder: Path) -> lazarus.ActivationDiff:
    prompts: list[Any] = [{"prompt": "Hello\n\x1b[0m", "group": "g"}, "What is AI?" * 3]
    return lazarus.activation_diff(str(base_folder), str(finetuned_folder), prompts)


@pytest.fixture
def document(diff: lazarus.ActivationDiff, tmp_path: Path) -> Any:
    diff.save(tmp_path / "x.json")
    return json.loads((tmp_path / "x.json").read_bytes())


def test_the_json_has_the_fields_of_the_contract_and_of_what_comes_later(document: Any) -> None:
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    assert list(document)[:4] == ["schema_version", "command", "tool", "created"]
    assert set(document["base"]) >= MODEL
    assert set(document["prompts"][0]) >= {"index", "text", "group", "n_tokens"}
    for part, names in FIELDS.items():
        record = document[part] if part == "summary" else document[part][0]
        assert set(record) >= names
    assert {"output", "readout", "groups", "notes"} <= set(document)
    assert document["prompts"][1]["text"] == "What is AI?" * 3
    assert document["prompts"][0]["group"] == "g"


def test_numbers_are_at_full_precision(diff: lazarus.ActivationDiff, document: Any) -> None:
    for ours, saved in zip(diff.layers, document["layers"], strict=True):
        assert saved["divergence"] == ours.divergence
    mean = diff.results.column("divergence").mean(axis=0)
    np.testing.assert_allclose([layer.divergence or 0.0 for layer in diff.layers], mean, rtol=1e-15)


def test_a_result_comes_back_as_it_was(diff: lazarus.ActivationDiff, tmp_path: Path) -> None:
    diff.save(tmp_path / "x.json")
    assert lazarus.ActivationDiff.load(tmp_path / "x.json").record == diff.record


@pytest.mark.parametrize(
    "mutate",
    [
        lambda d: d.update(schema_version="2.0"),
        lambda d: d["layers"][0].update(surprise=1),
        lambda d: d["layers"][0].pop("divergence"),
        lambda d: d["results"].pop(),
        lambda d: d["results"].reverse(),
    ],
)
def test_what_is_no_result_is_refused(document: Any, mutate: Any, tmp_path: Path) -> None:
    mutate(document)
    (tmp_path / "y.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ResultFileError, match=r"y\.json: "):
        lazarus.ActivationDiff.load(tmp_path / "y.json")


def test_rows_are_a_sequence_over_columns() -> None:
    columns = {"divergence": np.array([[0.1, np.nan], [0.3, 0.4]])}
    rows = ResultRows(["a", "b"], columns)
    assert len(rows) == 4
    assert [row.divergence for row in rows] == [0.1, None, 0.3, 0.4]
    assert (rows[-1].prompt, rows[-1].layer, rows[2].prompt_index) == ("b", 1, 1)
    assert rows[1:3] == [rows[1], rows[2]]
    assert ResultRows.from_rows([list(rows)]) == rows
    with pytest.raises(IndexError):
        rows[4]
    assert isinstance(rows[0], ResultRow)


def test_saving_keeps_permissions_and_links_and_leaves_nothing_beside(
    diff: lazarus.ActivationDiff, tmp_path: Path
) -> None:
    target = tmp_path / "real.json"
    target.write_text("old", encoding="utf-8")
    target.chmod(0o640)
    (tmp_path / "link.json").symlink_to(target)
    diff.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads(target.read_bytes())["command"] == "activation-diff"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    diff.save(tmp_path / "new.csv")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new.csv").stat().st_mode) == 0o666 & ~mask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "new.csv", "real.json"]


def test_a_device_is_written_to_and_not_replaced(diff: lazarus.ActivationDiff) -> None:
    save.save(diff.record, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(SaveError, match="No space left on device"):
        save.save(diff.record, "/dev/full")


def test_control_characters_stay_on_their_line(diff: lazarus.ActivationDiff) -> None:
    assert "Prompt: Hello\\n\\x1b[0m..." in str(diff).splitlines()
    assert escaped("a\u2028b\u202ec\ud800") == "a\\u2028b\\u202ec\\ud800"
    assert escaped("naïve 日本 👩‍💻") == "naïve 日本 👩‍💻"


def test_to_pandas_has_a_row_a_prompt_and_layer(diff: lazarus.ActivationDiff) -> None:
    frame = diff.to_pandas()
    assert len(frame) == 2 * 4
    assert frame["divergence"].tolist() == diff.results.column("divergence").ravel().tolist()
    assert frame["group"].isna().tolist() == [False] * 4 + [True] * 4


def broken(change: Callable[[bytes], bytes], n_prompts: int = 3, n_layers: int = 4) -> str:
    """What reading a damaged file says."""
    stream = io.BytesIO()
    write_json(record_of(divergences(n_prompts, n_layers)), stream)
    with pytest.raises(ResultFileError) as error:
        read_json(change(stream.getvalue()))
    return str(error.value)


@pytest.mark.parametrize("name", ["prompt_index", "layer"])
@pytest.mark.parametrize("number", [2**63 - 1, 10**20])
def test_a_number_that_no_prompt_and_no_layer_can_have_is_refused(name: str, number: int) -> None:
    def changed(text: bytes) -> bytes:
        head, mark, rows = text.partition(b'"results"')
        return head + mark + rows.replace(f'"{name}":1,'.encode(), f'"{name}":{number},'.encode(), 1)

    assert "not one a prompt and layer, in order" in broken(changed)


def test_a_comma_too_few_or_too_many_between_rows_is_refused() -> None:
    assert "malformed" in broken(lambda text: text.replace(b'}\n  ],\n  "summary', b'},\n  ],\n  "summary'))
    rows = 30_000  # several parts of what is read at once
    for at in range(rows // 4, rows, rows // 4):

        def without(text: bytes, at: int = at) -> bytes:
            lines = text.split(b"\n")
            start = lines.index(b'  "results": [') + at
            lines[start] = lines[start].removesuffix(b",")
            return b"\n".join(lines)

        assert "malformed" in broken(without, n_prompts=3000, n_layers=10)


def test_a_fault_after_the_rows_is_told_by_its_place_in_the_file() -> None:
    stream = io.BytesIO()
    write_json(record_of(divergences(3, 4)), stream)
    text = stream.getvalue().replace(b'"summary": {', b'"summary": {,')
    said = broken(lambda _: text)
    assert f"byte {text.index(b'{,') + 1}" in said


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.update(layers=[]), "layers: 0, and results has the rows of 4"),
        (lambda d: d["prompts"].pop(), "prompts: 1, and results has the rows of 2"),
        (lambda d: d["layers"][0].update(layer=4), "layers: there is no layer 4 among 4"),
        (lambda d: d["summary"].update(onset_layer=9), "summary.onset_layer: there is no layer 9 among 4"),
    ],
)
def test_a_result_whose_parts_contradict_each_other_is_refused(
    document: Any, change: Callable[[Any], Any], told: str
) -> None:
    change(document)
    with pytest.raises(ResultFileError, match=told):
        read_json(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("make", "change", "told"),
    [
        (whole_record, lambda d: d.update(results=[]), "summary.n_tensors"),
        (whole_record, lambda d: d.update(layers=[]), "layers: not those that the rows of results are in"),
        (whole_record, lambda d: d["summary"].update(most_changed=[999]), "there is no row 999"),
        (whole_record, lambda d: d["notes"].append("one more"), "note_codes: "),
        (lens_record, lambda d: d["layers"].pop(), "layers: not the layers of model1"),
        (lens_record, lambda d: d["model2"]["layers"].pop(0), "model2.layers: not the 4 layers"),
        (lens_record, lambda d: d["model1"]["tracked"].pop(), "model1.tracked: "),
        (lens_record, lambda d: d["summary"].update(most_divergent_layer=9), "there is no layer 9 among 4"),
    ],
)
def test_so_is_one_of_another_command(
    make: Callable[[], Any], change: Callable[[Any], Any], told: str
) -> None:
    stream = io.BytesIO()
    write_json(make(), stream)
    assert read_json(stream.getvalue()) == make()
    document = json.loads(stream.getvalue())
    document["note_codes"] = document["note_codes"] or ["few-prompts"] * len(document["notes"])
    change(document)
    with pytest.raises(ResultFileError, match=told):
        read_json(json.dumps(document).encode())


def test_a_column_that_is_none_is_refused(diff: lazarus.ActivationDiff) -> None:
    with pytest.raises(ValueError, match=r"no column .divergense.\. The columns are cosine_similarity, "):
        diff.record.results.column("divergense")


@pytest.mark.parametrize(
    ("record", "metrics", "others"),
    [
        (Measures, METRICS, set()),
        (Output, METRICS, {"noise_floor"}),  # of the logits
        (Readout, METRICS, set()),
        (TensorRecord, WEIGHT_METRICS, set()),
        (Spectrum, WEIGHT_METRICS, set()),
        (LensPair, LENS_METRICS, {"same_first_choice"}),  # yes or no: needs no description
    ],
)
def test_the_schema_describes_a_metric_as_its_definition_does(
    record: type[Any], metrics: dict[str, Metric], others: set[str]
) -> None:
    hints = get_type_hints(record, include_extras=True)
    named = hints.keys() & metrics.keys()
    assert {name for name in named if metrics[name].meta in metadata(hints[name])} == named - others


def metadata(hint: Any) -> list[Any]:
    """Return what annotates a type, or one of the types that it is a union of."""
    inner = [found for part in getattr(hint, "__args__", ()) for found in metadata(part)]
    return [*getattr(hint, "__metadata__", ()), *inner]
