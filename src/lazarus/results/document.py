"""Records to and from JSON, and the JSON Schema that documents it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import IO, Any

import msgspec

from lazarus.commands import commands
from lazarus.errors import ResultFileError
from lazarus.results.consistency import contradiction
from lazarus.results.measured import LayerRecord, SiteRecord
from lazarus.results.records import SCHEMA_VERSION, Tool
from lazarus.results.rows import ResultRow, ResultRows


class _Head(msgspec.Struct):
    """Fields that every JSON result begins with."""

    schema_version: str
    command: str
    tool: Tool


_ROWS = b'\n  "results": [\n', b"\n  ]"
"""What stands around the rows of a file. A text in JSON holds no line break, so these are nowhere else."""
_CHUNK_BYTES = 4_000_000
_NO_ROWS = msgspec.json.encode(
    ResultRow(
        prompt_index=0,
        prompt="",
        layer=0,
        cosine_similarity=None,
        divergence=None,
        relative_l2=None,
        norm_ratio=None,
        centered_cosine_similarity=None,
    )
)
"""one row, which takes the place of all while the rest of a record is read"""


def write_json(record: Any, stream: IO[bytes]) -> None:
    """Write the record as JSON, one row a line, without ever holding the whole text."""
    encoder = msgspec.json.Encoder()
    separator = b"{\n"
    for name in record.__struct_fields__:
        value = getattr(record, name)
        stream.write(separator + b"  " + encoder.encode(name) + b": ")
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            items = (
                value.encoded()
                if isinstance(value, ResultRows)
                else (encoder.encode(_labelled(item)) for item in value)
            )
            stream.write(b"[\n    " + next(items))
            stream.writelines(b",\n    " + item for item in items)
            stream.write(b"\n  ]")
        else:
            stream.write(encoder.encode(value))
        separator = b",\n"
    stream.write(b"\n}\n")


_DAMAGE = (msgspec.DecodeError, UnicodeDecodeError)
"""what msgspec raises for a text that is no JSON, or no UTF-8"""


def read_json(text: bytes) -> Any:
    """Read a record back, checking every field; one that an earlier version did not measure is null.

    Raises:
        ResultFileError: it is not JSON, no result of lazarus, or one of another schema version.
    """
    try:
        rows, rest = _rows_apart(text)
        try:
            head, record = _decoded(rest)
        except _DAMAGE:
            rows, (head, record) = None, _decoded(text)  # which says where in the file the fault is
        if record is not None:
            found = record if rows is None else msgspec.structs.replace(record, results=rows)
            if why := contradiction(found):
                raise ResultFileError(f"{why}. The file was changed: give it as lazarus saved it.")
            return found
    except (*_DAMAGE, RecursionError) as error:
        raise ResultFileError(
            f"not a result of schema version {SCHEMA_VERSION}: {error}. Give a file that lazarus saved with "
            "-o FILE.json."
        ) from error
    raise ResultFileError(
        f"a result of {head.command}, schema version {head.schema_version}, saved by {head.tool.name} "
        f"{head.tool.version}; this version reads {', '.join(commands())} of schema version "
        f"{SCHEMA_VERSION}. Read it with the version that saved it, or compare again."
    )


def _decoded(text: bytes) -> tuple[_Head, Any | None]:
    """Return what a text begins with, and the record; None where this version does not read it."""
    head = msgspec.json.decode(text, type=_Head)
    is_known = head.schema_version == SCHEMA_VERSION and head.command in commands()
    return head, _decoder(head.command).decode(text) if is_known else None


def _rows_apart(text: bytes) -> tuple[ResultRows | None, bytes]:
    """Read the rows that stand one a line, as `write_json` puts them, and return them and the text without.

    Rows that do not, or in which there is a fault, stay in the text: reading that tells where the fault is.
    """
    opening, closing = _ROWS
    start = text.find(opening)
    end = text.find(closing, start) if start >= 0 else -1
    if end < 0 or text.find(opening, end) >= 0:
        return None, text
    start += len(opening)
    try:
        return ResultRows.from_rows(_chunks(text, start, end)), text[:start] + _NO_ROWS + text[end:]
    except (*_DAMAGE, ResultFileError):
        return None, text


def _chunks(text: bytes, start: int, end: int) -> Iterator[list[ResultRow]]:
    decoder = msgspec.json.Decoder(list[ResultRow])
    while start < end:
        cut = end
        if end - start > _CHUNK_BYTES:
            cut = text.find(b"\n", start + _CHUNK_BYTES, end)
            cut = end if cut < 0 else cut
        chunk = text[start:cut].rstrip()
        if chunk.endswith(b",") == (cut == end):
            raise msgspec.DecodeError("a comma between two rows is missing, or one is after the last")
        yield decoder.decode(b"[" + chunk.removesuffix(b",") + b"]")
        start = cut + 1


def json_schema(command: str = "activation-diff") -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what a command's `-o FILE.json` writes."""
    (reference,), components = msgspec.json.schema_components(
        [commands()[command].load("record")], schema_hook=_rows_schema, ref_template="#/$defs/{name}"
    )
    if command == "activation-diff":
        _, rows = msgspec.json.schema_components([ResultRow], ref_template="#/$defs/{name}")
        components = {**components, **rows}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"lazarus {command}",
        **reference,
        "$defs": components,
    }


def _labelled(item: object) -> object:
    """The record with its layer or name in front, where a reader's eye looks for it."""
    if isinstance(item, LayerRecord):
        return {"layer": item.layer, **msgspec.structs.asdict(item)}
    if isinstance(item, SiteRecord):
        return {"name": item.name, **msgspec.structs.asdict(item)}
    return item


def _rows_schema(kind: type) -> dict[str, Any]:
    assert kind is ResultRows, kind
    return {"type": "array", "items": {"$ref": "#/$defs/ResultRow"}}


def _rows_from_json(kind: type, rows: Any) -> ResultRows:
    assert kind is ResultRows, kind
    return ResultRows.from_rows([msgspec.convert(rows, list[ResultRow])])


@cache
def _decoder(command: str) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(commands()[command].load("record"), dec_hook=_rows_from_json)
