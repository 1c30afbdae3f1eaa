"""A saved result that somebody has changed is refused or shown, whatever was changed: no fault of ours."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lazarus
import made_lens
import made_records
import made_weights
from lazarus.errors import LazarusError, ResultFileError
from lazarus.result_classes import load_result
from lazarus.results.document import read_json, write_json

MADE: dict[str, Callable[[], Any]] = {
    "activation-diff": made_records.whole_record,
    "compare": made_lens.lens_record,
    "weight-diff": lambda: made_weights.record_of(made_weights.layer_rows(3)),
}
OTHERS: dict[type, tuple[Any, ...]] = {
    bool: (None,),
    int: (-1, 2**70),
    float: (1e308,),
    str: ("",),
    type(None): (),
}


def plain(record: Any) -> Any:
    stream = io.BytesIO()
    write_json(record, stream)
    return json.loads(stream.getvalue())


def changed(value: Any) -> Iterator[Any]:
    """Yield copies of a value in which one thing is another; of lists the first items alone."""
    if isinstance(value, list):
        yield from ([], value + value[:1], value[:-1], None)
        for i, item in list(enumerate(value))[:1]:
            yield from ([*value[:i], other, *value[i + 1 :]] for other in changed(item))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from ({**value, key: other} for other in changed(item))
    else:
        yield from (*OTHERS[type(value)], *([] if value is None else [None]))


def check(document: Any, folder: Path) -> int:
    """Show and save each change of a result, and return how many are shown."""
    path, n_shown = folder / "saved.json", 0
    for other in changed(copy.deepcopy(document)):
        path.write_text(json.dumps(other), encoding="utf-8")
        try:
            found = load_result(path)
            assert str(found)
            found.save(folder / "again.md")
            if n_shown % 8 == 0:  # a page takes ten times as long
                found.save(folder / "again.html")
        except LazarusError:
            continue
        n_shown += 1
    return n_shown


@pytest.mark.parametrize("command", MADE)
def test_a_result_that_was_changed_is_refused_or_shown(command: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numbers that overflow when they are squared
        assert check(plain(MADE[command]()), tmp_path) > 50


def test_a_series_that_was_changed_is_refused_or_shown(
    tmp_path: Path, base_folder: Path, finetuned_folder: Path
) -> None:
    found = lazarus.series(str(base_folder), [str(finetuned_folder), str(base_folder)], ["t1 t2", "t3", "t4"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert check(plain(found.record), tmp_path) > 50


@pytest.mark.parametrize(
    "held", [b'{"schema_version": "1.0", "command": "\xff"', b'\xff\xfe{"', b'{"x": "\\ud800"}']
)
def test_bytes_that_are_no_text_are_no_result(held: bytes) -> None:
    with pytest.raises(ResultFileError, match="not a result"):
        read_json(held)
