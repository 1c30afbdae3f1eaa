"""A file of prompts: its lines, or the rows of JSON, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazarus.bounds import LIFT, MOST_UNPACKED, exceeds
from lazarus.errors import MissingPackageError, PromptsError
from lazarus.foreign import user_path
from lazarus.notes import Notes
from lazarus.prompts.prompt import Prompt
from lazarus.prompts.rows import FIELDS, from_row, note_counted, parse_json

Rows = Iterator[tuple[str, Any]]
"""rows, each with the place where it stands"""

_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_NO_PROMPTS = (
    ("compressed", "Unpack it", ".gz .bz2 .xz .zst .zip .7z .lz4 .br .tar .tgz"),
    ("a spreadsheet", "Save the sheet as .csv", ".xlsx .xls .ods"),
    ("a binary table", "Save it as .parquet", ".arrow .feather .orc .avro"),
    ("a document", "Save its text as .txt", ".pdf .docx .doc .odt .rtf .pptx .epub"),
    ("structured text", "Save its prompts as .jsonl", ".yaml .yml .toml .xml .html .htm .ipynb"),
    (
        "binary",
        "Save its prompts as .jsonl",
        ".pkl .pickle .npy .npz .pt .pth .safetensors .h5 .hdf5 .msgpack",
    ),
    ("a database", "Save its prompts as .jsonl", ".db .sqlite .sqlite3 .duckdb"),
)
"""kinds of files whose lines are no prompts: what they are, what to do, and their suffixes"""


def read_file(name: str, notes: Notes, *, responses: bool = False) -> list[Prompt]:
    """Return the prompts of a file, of which the suffix tells the kind; `-` is standard input.

    With `responses` those of the rows are read too.

    Raises:
        PromptsError: it cannot be read, is of a kind that holds no prompts, or has a row without one.
        MissingPackageError: it is Parquet, and pyarrow is missing.
    """
    if not name:
        raise PromptsError("-p @: no file is named after the @. Write -p @prompts.txt, or -p @-.")
    suffix = Path(name).suffix.lower()
    for kind, advice, suffixes in _NO_PROMPTS:
        if suffix in suffixes.split():
            raise PromptsError(f"-p @{name}: a {suffix} file is {kind}: its lines are no prompts. {advice}.")
    if suffix == ".parquet":
        rows = _parquet_rows(name)
    elif suffix in _JSON_LINES:
        rows = _json_lines(_read(name), name)
    elif suffix == ".json":
        rows = _json_rows(_read(name), name, notes)
    elif suffix in _SEPARATORS:
        rows = _csv_rows(_read(name), name, _SEPARATORS[suffix])
    else:
        return _lines(_read(name), name, notes)
    remarks = Counter[str]()
    # Parquet has one schema for all rows: a key that one message has is null in all that lack it.
    fills = suffix == ".parquet"
    prompts = [from_row(row, place, remarks, fills=fills, responses=responses) for place, row in rows]
    note_counted(remarks, name, notes)
    if not prompts:
        notes.add("prompt-file", f"{name} holds no prompt")
    return prompts


def _read(name: str) -> str:
    """The file's text, or standard input's for `-`; a byte order mark is dropped."""
    try:
        raw = _standard_input() if name == "-" else _content(user_path(name))
    except IsADirectoryError as error:
        raise PromptsError(f"-p @{name}: this is a folder. Name a file in it.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptsError(f"-p @{name}: cannot be read: {reason}. Check the path.") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptsError(
            f"-p @{name}, line {line}: not UTF-8: byte 0x{raw[error.start]:02x} at position "
            f"{error.start}. Convert the file to UTF-8."
        ) from error
    before, nul, _ = text.partition("\0")
    if nul:  # English in UTF-16 is valid UTF-8, with one of these beside each letter
        line = before.count("\n") + 1
        raise PromptsError(
            f"-p @{name}, line {line}: a NUL character: the file is binary, or UTF-16. Convert it to UTF-8."
        )
    return text


def _content(path: Path) -> bytes:
    # A pipe may be meant, as in <(zcat prompts.gz); a device such as /dev/zero has no end.
    if path.is_char_device() and not path.samefile("/dev/stdin"):
        raise ValueError("it is a device")
    return path.read_bytes()


def _standard_input() -> bytes:
    if sys.stdin is None:  # closed by whoever started this process
        raise PromptsError("-p @-: there is no standard input. Pipe the prompts in, or name a file.")
    return sys.stdin.buffer.read()


def _lines(text: str, name: str, notes: Notes) -> list[Prompt]:
    """Each line is a prompt, without the white space around it; lines of JSON are noted, and left as text."""
    # Not splitlines, which also breaks at form feeds and U+2028 within a text.
    lines = [line.strip() for line in io.StringIO(text, newline=None)]
    lines = [line for line in lines if line]
    if lines and (_is_json(text) or all(_is_json(line) for line in lines)):
        notes.add(
            "prompt-file",
            f"{name} holds JSON and was read as lines of text, with all braces and quotation marks; of a "
            "file named .jsonl or .json, `prompt`, `text` or `messages` is read",
        )
    return [Prompt(line) for line in lines]


def _is_json(text: str) -> bool:
    """Return whether it is a JSON object or list."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(text: str, name: str) -> Rows:
    # Not splitlines: JSON allows U+2028 and the like within a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"-p @{name}, line {number}"
            yield place, parse_json(line, f"{place}:", "Put one object on each line.")


def _json_rows(text: str, name: str, notes: Notes) -> Rows:
    """The rows of a list, of the one list in an object, or of an object on each line."""
    first, _, rest = text.strip().partition("\n")
    if rest and first.startswith("{") and _is_json(first):
        yield from _json_lines(text, name)
        return
    expected = "Write a list of texts or of objects, or an object on each line."
    value = parse_json(text, f"-p @{name}:", expected) if first else []
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if any(key in value for key in FIELDS):
            value = [value]
        elif len(lists) == 1:
            told = f"{name}: the prompts are those in its field `{lists[0]}`; others were not read"
            notes.add("prompt-file", told)
            value = value[lists[0]]
    if not isinstance(value, list):
        what = f"an object with the fields {sorted(value)}" if isinstance(value, dict) else f"{value!r:.40}"
        raise PromptsError(f"-p @{name}: its JSON is {what}, not a list of prompts. {expected}")
    for number, row in enumerate(value):
        yield f"-p @{name}, item {number}", row


def _csv_rows(text: str, name: str, separator: str) -> Rows:
    # The default, 131,072 characters a cell, is less than a long prompt has.
    csv.field_size_limit(sys.maxsize)
    # Not strict, csv drops quotation marks out of a text, or takes all lines up to the next one into it.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = list(reader.fieldnames or [])
        if text.strip() and not set(FIELDS) & set(columns):
            raise PromptsError(
                f"-p @{name}: no column `prompt` or `text`; the columns are {columns}. Add a header line."
            )
        twice = sorted({column for column in columns if column and columns.count(column) > 1})
        if twice:
            raise PromptsError(f"-p @{name}: two columns are called {twice[0]}. Rename or drop one of them.")
        for row in reader:
            place = f"-p @{name}, line {reader.line_num}"
            # DictReader keeps cells beyond the header under the key None; empty ones are mere separators.
            surplus = row.pop(None, [])
            if any(surplus):
                raise PromptsError(
                    f"{place}: {len(columns) + len(surplus)} cells, and the header has {len(columns)}. Put "
                    "quotation marks around a text with a separator in it."
                )
            yield place, row
    except csv.Error as error:
        line = reader.reader.line_num
        raise PromptsError(
            f"-p @{name}, line {line}: its quotation marks are not those of a CSV row: {error}. Put them "
            "around the whole text, and double those within it."
        ) from error


_ROW_BYTES = 64
"""what a row takes beside its texts, at least"""


def _unpacked(name: str, file: Any) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file.

    Raises:
        PromptsError: they are a hundred times as large as the file, and larger than a limit.
    """
    most, taken = max(MOST_UNPACKED, 100 * user_path(name).stat().st_size), 0
    rows: list[dict[str, Any]] = []
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            taken += _ROW_BYTES + sum(len(value) for value in row.values() if isinstance(value, str))
            rows.append(row)
        if exceeds(taken, most):
            raise PromptsError(
                f"-p @{name}: its rows have more than {most // 2**20} MiB, the limit for a file of its size. "
                f"{LIFT}"
            )
    return rows


def _parquet_rows(name: str) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            f"-p @{name}: reading Parquet needs the package pyarrow. Install it with "
            "`pip install 'lazarus-introspect[parquet]'`."
        ) from error
    try:
        rows = _unpacked(name, pyarrow.parquet.ParquetFile(user_path(name)))
    # A text that is no UTF-8, or a date that Python has not, shows when rows are made of the columns.
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise PromptsError(
            f"-p @{name}: cannot be read as Parquet: {reason}. Write the file again."
        ) from error
    for number, row in enumerate(rows):
        yield f"-p @{name}, row {number}", row
