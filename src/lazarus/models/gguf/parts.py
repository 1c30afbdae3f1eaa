"""The files of one GGUF model: a single one, or all parts of a split one, whichever part was named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

from lazarus.errors import ModelNotFoundError, WeightsError
from lazarus.models.faults import translated
from lazarus.models.gguf.choice import PART
from lazarus.models.gguf.header import Header, StoredArray, read_header
from lazarus.models.reference import Source

_JOIN = "join the parts with `llama-gguf-split --merge`"


@dataclass(frozen=True)
class Gguf:
    """A GGUF model: the metadata of its first file, and the tensors of all."""

    name: str
    """what the user calls it"""
    paths: tuple[str, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredArray]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture; empty where the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str) -> Any:
        """Return the architecture's own value of a key, such as `block_count`; None where it is absent."""
        return self.metadata.get(self.key(key))

    def key(self, key: str) -> str:
        """Return the full name of one of the architecture's own keys."""
        return f"{self.architecture}.{key}"


def read_files(source: Source) -> Gguf:
    """Read the headers of all files of a GGUF model; those on the Hub are fetched.

    Raises:
        ModelNotFoundError: the file that was named is not there.
        WeightsError: a file is damaged, or the parts are not all there or not of one model.
        UnsupportedModelError: a file is of a version, a byte order or a ggml type that is not read.
    """
    file = source.gguf_file
    assert file is not None
    name = PART.fullmatch(PurePosixPath(file).name)
    if name is None or int(name["count"]) == 1:
        (header,) = headers = [_read(source, _fetch(source, [file])[0])]
        if (count := _split(header, "count") or 1) > 1:
            raise WeightsError(
                f"{source.name}: it is part {_split(header, 'no', 0) + 1} of {count} (split.no, "
                "split.count), and its name does not say so: parts are found by names like "
                f"NAME-00001-of-{count:05}.gguf. Give the parts such names, or {_JOIN}."
            )
    else:
        headers = [_read(source, path) for path in _fetch(source, _siblings(file, name))]
        _check(source, file, headers)
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    return Gguf(source.name, tuple(header.path for header in headers), headers[0].metadata, tensors)


def _siblings(file: str, name: re.Match[str]) -> list[str]:
    """The names of all parts, in the order of their numbers."""
    folder = file.removesuffix(name[0])
    ending = name[0][-len(".gguf") :]
    count = int(name["count"])
    return [f"{folder}{name['stem']}-{number + 1:05}-of-{count:05}{ending}" for number in range(count)]


def _fetch(source: Source, files: Sequence[str]) -> list[str]:
    """The paths of these files on this machine."""
    found = {file: source.file(file) for file in files}
    missing = [PurePosixPath(file).name for file, path in found.items() if path is None]
    if missing and len(files) == 1:
        raise ModelNotFoundError(
            f"{source.name}: no such file there, not in the cache, and the Hub cannot be reached or does "
            "not have it. Check the name, or download the file first."
        )
    if missing:
        raise WeightsError(
            f"{source.name}: it is split into {len(files)} parts, of which {len(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {some(missing)}. Fetch them into the same "
            "folder."
        )
    return [cast(str, path) for path in found.values()]


def _read(source: Source, path: str) -> Header:
    with translated(source.name):
        return read_header(source.name, path)


def _split(header: Header, key: str, absent: int | None = None) -> Any:
    return header.metadata.get(f"split.{key}", absent)


def _check(source: Source, file: str, headers: Sequence[Header]) -> None:
    """Refuse parts whose names and metadata disagree, or that are not of one model."""
    count = len(headers)
    for number, header in enumerate(headers):
        part = PurePosixPath(header.path).name
        # split.no begins with 0, and the numbers in names with 1.
        held = (_split(header, "no", 0) + 1, _split(header, "count", 1))
        if held != (number + 1, count):
            raise WeightsError(
                f"{source.name}: by its name {part} is part {number + 1} of {count}, and by its metadata "
                f"part {held[0]} of {held[1]} (split.no, split.count). It was renamed, or is of another "
                "model: fetch the parts again."
            )
    for key in ("split.tensors.count", "general.architecture", "general.name"):
        values = {header.metadata[key] for header in headers if key in header.metadata}
        if len(values) > 1:
            raise WeightsError(
                f"{source.name}: its parts are not of one model: their {key} is "
                f"{' or '.join(sorted(map(repr, values)))}. Fetch the parts again."
            )
    held_by = Counter(name for header in headers for name in header.tensors)
    if twice := [name for name, n_parts in held_by.items() if n_parts > 1]:
        raise WeightsError(
            f"{source.name}: {twice[0]} is in {held_by[twice[0]]} of its parts: they are not of one model. "
            "Fetch the parts again."
        )
    total = _split(headers[0], "tensors.count")
    if total is not None and total != len(held_by):
        raise WeightsError(
            f"{source.name}: its {count} parts hold {len(held_by)} tensors, and should hold {total} "
            "(split.tensors.count). Fetch the parts again."
        )


def some(names: Sequence[str], most: int = 8) -> str:
    """The names on one line, the first few if they are many.

    >>> some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
