"""The report as data and markup: what is in the page, what is left out, and that it says so."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lazarus.render.activation import page, sample, tables
from lazarus.render.activation.answers import answers
from lazarus.render.activation.payload import payload
from lazarus.render.activation.sample import choose, choose_tokens
from lazarus.render.activation.summary import summary_lines
from lazarus.render.base import assets, cells
from lazarus.render.base.script import in_script
from lazarus.results import METRICS, ActivationDiffRecord, GroupCurve, Groups, Measures
from made_records import HOSTILE, cka_record, divergences, record_of, settings, token_trace, whole_record

MOST_BYTES = 3_000_000


class Markup(HTMLParser):
    """What a browser would see: elements with their attributes, the text outside scripts, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._raw: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._raw = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self.scripts.append((self.elements[-1][1], self._raw or ""))
        if tag in ("script", "style"):
            self._raw = None

    def handle_data(self, data: str) -> None:
        if self._raw is None:
            self.text += data
        else:
            self._raw += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def written(record: ActivationDiffRecord, rows_file: str | None = None) -> bytes:
    stream = io.BytesIO()
    page.write_html(record, stream, rows_file)
    return stream.getvalue()


def page_of(record: ActivationDiffRecord, rows_file: str | None = None) -> Markup:
    return Markup(written(record, rows_file).decode("utf-8"))


def floats(matrix: Any) -> Any:
    data = np.frombuffer(base64.b64decode(matrix["base64"]), dtype="<f8")
    return data.reshape(matrix["rows"], matrix["columns"])


def script_data(markup: Markup) -> Any:
    (found,) = [text for attributes, text in markup.scripts if attributes.get("id") == "data"]
    return json.loads(found)


def long_texts(n_prompts: int, length: int) -> list[str]:
    return [f"{i} " + "é" * length for i in range(n_prompts)]


def test_the_data_of_a_small_result_is_the_known_one(golden: Callable[[str, str], None]) -> None:
    record = whole_record()
    data = payload(record, choose(record), choose_tokens(record, len(record.prompts)))
    golden("report-data.json", json.dumps(data, indent=1) + "\n")


def test_the_page_holds_the_very_numbers_of_the_result() -> None:
    record = whole_record()
    data = script_data(page_of(record))
    np.testing.assert_array_equal(floats(data["prompts"]["divergence"]), record.results.column("divergence"))
    assert data["series"]["divergence"] == [layer.divergence for layer in record.layers]
    assert record.tokens is not None
    for ours, trace in zip(record.tokens, data["tokens"], strict=True):
        np.testing.assert_array_equal(floats(trace["divergence"]), np.array(ours.divergence, dtype=float))
        assert trace["tokens"] == ours.tokens


def test_equal_results_give_equal_bytes() -> None:
    assert written(whole_record()) == written(whole_record())
    big = record_of(divergences(3000, 40))
    assert written(big) == written(big)


def test_prompts_are_text_wherever_they_stand() -> None:
    record = whole_record()
    markup = page_of(msgspec.structs.replace(record, notes=list(HOSTILE)))
    assert [attributes.get("type") for attributes, _ in markup.scripts] == [
        "application/json",
        "text/plain",
        None,
    ]
    assert not markup.attributes("img")
    assert "<script>window.pwned=1</script>" in markup.text
    assert "{{ 7 * 7 }}" in markup.text
    assert script_data(markup)["prompts"]["text"] == list(HOSTILE) + [f"Prompt number {i}" for i in range(5)]


def test_half_a_surrogate_does_not_stop_the_page() -> None:
    texts = ["half \ud800 of one", "whole"]
    markup = page_of(record_of(divergences(2, 3), texts, notes=["a note with \udfff"]))
    assert script_data(markup)["prompts"]["text"] == texts


def test_the_policy_lets_the_two_scripts_run_and_nothing_else() -> None:
    markup = page_of(whole_record())
    (policy,) = [
        a["content"] for a in markup.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    codes = [text for attributes, text in markup.scripts if attributes.get("id") != "data"]
    assert sorted(rules.pop("script-src").split()) == sorted(assets.csp_hash(code) for code in codes)
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    loads = [
        a for _, a in markup.elements if "src" in a or not str(a.get("href", "#")).startswith(("#", "data:"))
    ]
    assert loads == []


def test_the_library_is_the_published_one() -> None:
    """As the SBOM has it, which a wheel carries in its metadata."""
    (about,) = json.loads((assets.VENDOR / "sbom.cdx.json").read_text(encoding="utf-8"))["components"]
    code = (assets.VENDOR / assets.PLOTLY).read_bytes()
    assert about["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(code).hexdigest()}]
    assert f"v{about['version']}".encode() in code[:200]
    assert about["purl"] == f"pkg:npm/plotly.js-cartesian-dist-min@{about['version']}"
    assert about["description"].endswith(f"lazarus/render/base/vendor/{assets.PLOTLY}")
    assert "MIT License" in (assets.VENDOR / "LICENSE").read_text(encoding="utf-8")
    assert not re.search(r"</script|<!--|\r", code.decode("utf-8"), re.IGNORECASE)


def test_every_script_of_the_folder_is_in_the_page() -> None:
    own, shared = (
        {path.stem for path in (folder / "js").glob("*.js")}
        for folder in (Path(page.__file__).parent, assets.HERE)
    )
    # theme.js is all that a page without plots runs; this one starts the theme in main.js.
    assert own | shared - {"theme"} == set(page.SCRIPTS)


@pytest.mark.parametrize("n_layers", [80, 33, 1])
def test_a_large_result_stays_small_and_says_what_it_lacks(n_layers: int) -> None:
    n_prompts = 1000 if n_layers == 80 else 20_000
    record = record_of(divergences(n_prompts, n_layers), long_texts(n_prompts, 300))
    content = written(record, "result.rows.parquet")
    assert len(content) < MOST_BYTES
    assert page.is_sampled(record) == (n_layers != 80)
    markup = Markup(content.decode("utf-8"))
    kept = script_data(markup)["prompts"]["index"]
    if n_layers == 80:
        assert kept == list(range(n_prompts))
        assert "1,000 of the texts are longer than" in markup.text
    else:
        assert f"room for {len(kept):,} of the 20,000 prompts" in markup.text
        assert "result.rows.parquet" in markup.text
        assert f"the {len(kept) // 2:,} with the largest divergence" in markup.text


def test_the_largest_page_of_everything_is_below_the_bound() -> None:
    values, small = divergences(1000, 80), whole_record(12, 80)
    text = "\u0001" * 500
    record = record_of(values, [text] * 1000)
    assert small.readout is not None
    ten = [token for token in small.readout[0].base_promoted for _ in range(3)][:10]
    everything = msgspec.structs.replace(
        record,
        layers=small.layers,
        readout=[
            msgspec.structs.replace(
                small.readout[0],
                layer=i,
                base_promoted=ten,
                base_suppressed=ten,
                finetuned_promoted=ten,
                finetuned_suppressed=ten,
            )
            for i in range(80)
        ],
        groups=Groups(
            curves=[
                GroupCurve(group=f"group {i}", n_prompts=2, divergence=values[i].tolist()) for i in range(500)
            ],
            contrasts=[],
        ),
        tokens=[token_trace(i, "a word and " * 40, 80) for i in range(50)],
        notes=[f"layer {i}: something that a reader must know of it" for i in range(80)],
    )
    assert len(written(everything)) < MOST_BYTES
    assert "The first 8 of 500 groups are drawn." in page_of(everything).text


def test_a_sample_is_the_worst_half_and_a_drawn_half() -> None:
    values = divergences(3000, 40)
    chosen = sample.choose(record_of(values))
    largest = values.max(axis=1)
    assert len(chosen.indexes) == sample.MOST_CELLS // 40
    assert sorted(set(chosen.indexes)) == list(chosen.indexes)
    worst = set(np.argsort(-largest, kind="stable")[: chosen.n_worst].tolist())
    assert worst <= set(chosen.indexes)
    drawn = sorted(set(chosen.indexes) - worst)
    assert len(drawn) == len(chosen.indexes) - len(worst)
    assert np.median(largest[drawn]) == pytest.approx(np.median(np.delete(largest, sorted(worst))), rel=0.2)
    other = sample.choose(record_of(values, settings=settings(seed=1)))
    assert worst <= set(other.indexes)
    assert sorted(other.indexes) != sorted(chosen.indexes)


def test_prompts_without_a_value_are_not_the_worst() -> None:
    values = np.array([[np.nan, np.nan], [0.1, np.nan], [0.2, 0.3], [-1.0, 0.0]])
    assert sample.worst_first(values) == [2, 1, 3, 0]


def test_texts_are_cut_no_more_than_they_must_be() -> None:
    few = sample.choose(record_of(divergences(3, 2), long_texts(3, 10_000)))
    assert [len(text) for text in few.texts] == [sample.MOST_CHARACTERS] * 3
    assert few.n_cut == 3
    texts = long_texts(1000, 1000)
    many = sample.choose(record_of(divergences(1000, 2), texts))
    assert many.is_whole
    size = sum(len(in_script(t[: many.characters + 1]).encode()) + sample.BYTES_A_PROMPT for t in texts)
    assert size > sample.MOST_TEXT_BYTES


def test_tokens_fit_beside_the_prompts_or_the_page_says_how_many_do() -> None:
    record = whole_record()
    long = [token_trace(i, "word " * 2500, 6) for i in range(8)]
    record = msgspec.structs.replace(record, tokens=long)
    markup = page_of(record)
    shown = script_data(markup)["tokens"]
    assert 0 < len(shown) < 8
    assert len(shown[0]["tokens"]) == len(long[0].tokens)
    assert f"room for the tokens of {len(shown)} of 8 prompts" in markup.text
    one = page_of(msgspec.structs.replace(record, tokens=[token_trace(0, "word " * 40_000, 6)]))
    kept = len(script_data(one)["tokens"][0]["tokens"])
    assert f"without its last {40_001 - kept:,} tokens" in one.text


def test_every_field_of_every_layer_is_in_the_table_at_full_precision() -> None:
    record = whole_record()
    table = tables.layers(record)
    places = [record.sites[0], *record.layers, record.sites[1]]
    names = [cell.field for cell in table.rows[0].cells]
    for place, row in zip(places, table.rows, strict=True):
        for cell in row.cells:
            assert cell.value == exact(place, cell.field), (row.name, cell.field)
    fields = set(Measures.__struct_fields__) - {"interval", "local"}
    known = fields | {"low", "high", "local_relative_l2", "local_cosine_similarity", "finetuned_layer"}
    assert len(names) + len(table.left_out) == len(known)
    assert set(names) == known - {"cka", "centered_cosine_similarity", "finetuned_layer"}


def exact(place: Any, name: str) -> str:
    ends = {"low": 0, "high": 1}
    if name in ends:
        return repr(place.interval[ends[name]])
    if name.startswith("local_"):
        return "" if place.local is None else repr(getattr(place.local, name.removeprefix("local_")))
    value = getattr(place, name)
    return (
        {None: "", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )


def test_a_number_that_is_not_zero_is_not_shown_as_zero() -> None:
    assert cells.cell(4e-9, METRICS["divergence"].format).shown == "4.0e-09"
    assert cells.cell(0.0, METRICS["divergence"].format).shown == "0.0000"
    assert cells.cell(None, ".4f") == cells.Cell("–", "")


def test_what_was_not_measured_is_absent_and_named_once() -> None:
    markup = page_of(record_of(divergences(4, 3)))
    sections = {attributes.get("id") for attributes in markup.attributes("section")}
    assert {"layers", "prompts", "provenance", "reading"} <= sections
    assert not sections & {"attribution", "tokens", "groups", "output", "readout"}
    for option in (
        "--localize",
        "--attribute blocks",
        "--readout auto",
        "--position all or response",
        "--sites all",
    ):
        assert markup.text.count(f"({option})") == 1
    whole = page_of(whole_record())
    there = {a.get("id") for a in whole.attributes("section")}
    assert {"attribution", "tokens", "groups", "output", "readout"} <= there
    assert "Not measured in this run" not in whole.text


def test_models_of_different_width_have_cka_and_no_divergence() -> None:
    markup = page_of(cka_record())
    ids = {attributes.get("id") for _, attributes in markup.elements}
    assert "cka" in ids
    assert "curve" not in ids
    assert script_data(markup)["prompts"]["divergence"] is None
    assert "CKA 0.6500 there, the least of 5 layers." in markup.text


def test_the_page_says_what_the_text_output_says() -> None:
    record = whole_record()
    text = " ".join(page_of(record).text.split())
    for line in summary_lines(record):
        assert " ".join(line.removeprefix("Verdict: c").split()) in text
    for note in record.notes:
        assert note in text
    for name in record.settings.__struct_fields__:
        assert name.replace("_", " ") in text


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [("changed", "Yes"), ("within_noise", "No"), ("identical", "No"), (None, "Not known")],
)
def test_the_first_answer_is_the_verdict(verdict: Any, expected: str) -> None:
    record = whole_record()
    changed = msgspec.structs.replace(
        record, summary=msgspec.structs.replace(record.summary, verdict=verdict)
    )
    assert answers(changed)[0].answer == expected


def test_the_answers_are_the_numbers_of_the_result() -> None:
    found = {answer.question: answer for answer in answers(whole_record())}
    assert found["Where?"].answer == "Layer 5"
    assert found["Which block did it?"].answer == "Block 3"
    assert "2 of 6 blocks changed" in found["Which block did it?"].reason
    assert found["Does it matter to the next token?"].answer == "On 25% of tokens"


def test_tokens_that_are_blank_or_would_break_the_line_can_be_seen() -> None:
    tokens = tables.readout(whole_record())[0].columns[0]
    assert [token for token, _ in tokens] == [" a", "<i>", "\\n", "\\u202eb"]
    record = whole_record()
    assert record.readout is not None
    blank = [msgspec.structs.replace(record.readout[0].base_promoted[0], token="  ")]
    changed = msgspec.structs.replace(record.readout[0], base_promoted=blank)
    shown = tables.readout(msgspec.structs.replace(record, readout=[changed]))[0].columns[0]
    assert [token for token, _ in shown] == ["␣␣"]


def test_mined_tokens_stand_in_the_page_with_their_frequencies() -> None:
    markup = page_of(whole_record())
    assert "among the 100 whose logits rise" in markup.text
    assert "1,234 compared positions" in markup.text
    assert "it would be 2.0%" in markup.text
    promoted, suppressed = tables.mined(whole_record())
    assert [(token, cell.shown) for token, cell in promoted] == [
        (" a", "75%"),
        ("<i>", "65%"),
        ("\\n", "55%"),
        ("\\u202eb", "45%"),
    ]
    assert [cell.value for _, cell in suppressed] == ["0.75"]
    without = msgspec.structs.replace(whole_record(), mined=None)
    assert tables.mined(without) == []
    assert "compared positions" not in page_of(without).text


def test_two_equal_models_have_nowhere_and_nothing() -> None:
    record = record_of(np.zeros((3, 4)))
    assert [answer.answer for answer in answers(record)][1] == "Nowhere"


def test_writing_needs_neither_torch_nor_a_network(tmp_path: Path) -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in assets.HERE.glob("*.py"))
    assert not re.search(r"^(import|from) (jinja2|markupsafe|torch|transformers)", source, re.MULTILINE)
    (tmp_path / "x.html").write_bytes(written(record_of(divergences(2, 2))))
    assert (tmp_path / "x.html").read_bytes().startswith(b"<!doctype html>")
