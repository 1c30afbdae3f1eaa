"""A stranger's small file is read whole, within bounds, and no message says what it holds."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lazarus.bounds import MOST_BYTES, MOST_NESTED, VARIABLE
from lazarus.errors import AdapterError
from lazarus.foreign import read_bytes, read_json, read_text, user_path

SECRET = "hf_AbCdEfGhIjKl"


def read(path: Path) -> object:
    return read_json(path, AdapterError, "Fetch it again.")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (SECRET, "no JSON: Expecting value (line 1, column 1)"),
        (f'{{"a": 1,\n "{SECRET}', "no JSON: Unterminated string starting at (line 2, column 2)"),
        (f'{{"{SECRET}": 1}} {SECRET}', "no JSON: Extra data (line 1, column 24)"),
        ("9" * 5000, "a number in it has thousands of digits"),
        ("[" * 200_000, "thousands of brackets stand within each other in it"),
        (nested(MOST_NESTED + 2), f"more than {MOST_NESTED} brackets stand within each other in it"),
        (r'{"a": "\ud800"}', "a text in it has half a character (a lone surrogate)"),
        (b"ab\xff", "not UTF-8: byte 0xff at position 2"),
    ],
)
def test_what_is_no_json_is_told_by_its_place_alone(tmp_path: Path, held: str | bytes, why: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(held if isinstance(held, bytes) else held.encode())
    with pytest.raises(AdapterError, match=f"^{re.escape(f'{path}: cannot be read: {why}.')}") as caught:
        read(path)
    assert SECRET not in str(caught.value)
    assert str(caught.value).endswith(("Fetch it again.", "lifts this limit."))


def test_json_is_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(r'{"a": [1, null, "\ud83d\ude00 é"]}', encoding="utf-8")
    assert read(path) == {"a": [1, None, "\U0001f600 é"]}
    path.write_text("null", encoding="utf-8")
    assert read(path) is None
    assert read_text(path, AdapterError, "") == "null"


def test_what_has_no_end_is_not_begun(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(AdapterError, match=r"no regular file|Is a directory"):
            read_bytes(path, AdapterError, "", None)


@pytest.mark.parametrize("more", [0, 1])
def test_a_pipe_that_the_user_names_is_read_to_its_end_or_to_a_limit(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"longer than what a pipe holds at once " * 10_000
    monkeypatch.setattr("lazarus.foreign.MOST_PIPED", len(text))
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as stream:
            stream.write(text + b"." * more)

    with ThreadPoolExecutor(1) as other, os.fdopen(reading):
        written, path = other.submit(write), Path(f"/dev/fd/{reading}")
        if more:
            with pytest.raises(AdapterError, match=f"the limit of such a file.*{VARIABLE}=1"):
                read_bytes(path, AdapterError, "", None, may_be_piped=True)
        else:
            assert read_bytes(path, AdapterError, "", None, may_be_piped=True) == text
        written.result()


def test_a_pipe_to_which_nobody_writes_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterError, match="nothing comes out of it"):
        read_bytes(tmp_path / "pipe", AdapterError, "", None, may_be_piped=True)


def test_a_file_beyond_the_limit_is_refused_and_the_limit_can_be_lifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    with pytest.raises(AdapterError, match=f"larger than 64 MiB.*{VARIABLE}=1"):
        read(path)
    monkeypatch.setenv(VARIABLE, "1")
    assert len(read_bytes(path, AdapterError, "")) == MOST_BYTES + 1
    path.write_text(nested(MOST_NESTED + 2), encoding="utf-8")
    assert isinstance(read(path), list)


def test_a_home_that_is_not_known_stays_as_it_is() -> None:
    assert user_path("~nobody99/x") == Path("~nobody99/x")
    assert user_path("~/x") == Path.home() / "x"
