"""Notes carry a code: one of a table, used where it stands, saved beside the sentence."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lazarus
from lazarus.notes import CODES, Note, Notes

SOURCE = Path(lazarus.__file__).parent
SAVED = sorted((Path(__file__).parent / "saved").glob("*.json"))


def codes_in(tree: ast.AST) -> Iterator[ast.expr]:
    """The codes of the calls that make a note: `Note(…)`, `notes.add(…)`, `weights.notes.add(…)`."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            called = ast.unparse(call.func)
            if called == "Note" or f".{called}".endswith(".notes.add"):
                yield call.args[0]


def test_every_code_of_the_source_is_in_the_table_and_every_one_of_the_table_is_used() -> None:
    used = set()
    for path in SOURCE.rglob("*.py"):
        if path != SOURCE / "notes.py":
            for code in codes_in(ast.parse(path.read_text(encoding="utf-8"))):
                assert isinstance(code, ast.Constant), f"{path}, line {code.lineno}: a code is a literal"
                used.add(code.value)
    assert used == CODES.keys()


@pytest.mark.parametrize("code", CODES)
def test_a_code_is_short_and_its_description_is_a_sentence(code: str) -> None:
    assert code == code.lower()
    assert code.replace("-", "").isalnum()
    assert len(code) <= 24
    assert CODES[code][0].isupper()
    assert CODES[code].endswith(".")


def test_an_unknown_code_is_refused() -> None:
    notes = Notes()
    with pytest.raises(ValueError, match="'few' is no code"):
        notes.add("few", "3 prompts")
    with pytest.raises(ValueError, match="'few' is no code"):
        Note("few", "3 prompts")
    assert len(notes) == 0


def test_notes_keep_their_order_and_a_text_comes_once() -> None:
    notes = Notes([Note("few-prompts", "b")])
    notes.add("cka-sample", "a", layers=[1, 2])
    notes.add("few-prompts", "b", model="base")
    notes.extend([Note("few-prompts", "c", prompts=(0,)), Note("cka-sample", "a")])
    assert notes.texts == ["b", "a", "c"]
    assert notes.codes == ["few-prompts", "cka-sample", "few-prompts"]
    assert list(notes)[1] == Note("cka-sample", "a", layers=(1, 2))


def test_notes_that_are_made_of_others_leave_them_alone() -> None:
    first = Notes([Note("few-prompts", "a")])
    Notes(first).add("few-prompts", "b")
    assert first.texts == ["a"]


@pytest.fixture(scope="module")
def results(base_folder: Path, finetuned_folder: Path) -> list[Any]:
    """One result of each command, each with several notes."""
    prompts = ["Hello", "Hello", "What is AI?"]
    return [
        lazarus.activation_diff(base_folder, finetuned_folder, prompts, position="all"),
        lazarus.weight_diff(base_folder, finetuned_folder),
        lazarus.compare(base_folder, finetuned_folder, "Hello", track=["zebra"]),
    ]


def test_each_note_of_a_result_has_its_code(results: list[Any], tmp_path: Path) -> None:
    diff, weights, comparison = results
    assert {"repeated-prompts", "few-prompts"} <= {*diff.note_codes}
    assert "tracked-token" in comparison.note_codes
    for number, result in enumerate((diff, weights, comparison)):
        assert len(result.note_codes) == len(result.notes)
        assert CODES.keys() >= {*result.note_codes}
        path = tmp_path / f"{number}.json"
        result.save(path)
        names = list(json.loads(path.read_text(encoding="utf-8")))
        assert names.index("note_codes") == names.index("notes") + 1
        again = lazarus.load_result(path)
        assert (again.notes, again.note_codes) == (result.notes, result.note_codes)


@pytest.mark.parametrize("command", [0, 1, 2], ids=["activation-diff", "weight-diff", "compare"])
def test_a_result_that_an_older_version_saved_has_its_notes_and_no_codes(
    command: int, results: list[Any], tmp_path: Path
) -> None:
    results[command].save(tmp_path / "new.json")
    document = json.loads((tmp_path / "new.json").read_text(encoding="utf-8"))
    del document["note_codes"]
    (tmp_path / "old.json").write_text(json.dumps(document), encoding="utf-8")
    old = lazarus.load_result(tmp_path / "old.json")
    assert (old.notes, old.note_codes) == (results[command].notes, [])


def test_what_an_older_version_saved_has_no_codes() -> None:
    for path in SAVED:
        assert "note_codes" not in path.read_text(encoding="utf-8")
        assert lazarus.load_result(path).note_codes == []
