"""What a folder holds besides the weights that are read from it: other sets of weights, and an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from lazarus.errors import WeightsError
from lazarus.models.checkpoint import read_headers, same_numbers
from lazarus.models.reference import ADAPTER_FILES, INDEX, WEIGHTS, Source

_WEIGHTS = (
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "consolidated*.pth",
    "*.gguf",
    "tf_model*.h5",
    "flax_model*.msgpack",
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|int8|fp8)(?=[.-])")
"""what diffusers and transformers put into the names of another dtype's files (`variant=`)"""
_MOST_TOLD = 6


@dataclass(frozen=True)
class Unread:
    """A file of weights that was not read."""

    name: str
    path: str
    is_copy: bool = False
    """it holds the weights that were read, bit for bit"""
    said: str = ""
    """what is known of it"""


@dataclass(frozen=True)
class Contents:
    """What of a folder was read, and what was not."""

    notes: tuple[str, ...] = ()
    unread: tuple[Unread, ...] = ()


def look_for_weights(source: Source) -> None:
    """Refuse a folder whose safetensors have names that are not looked for.

    Raises:
        WeightsError: the weights are there, and their name or their index is not the usual one.
    """
    if source.kind != "folder" or source.weights_file:
        return
    folder = Path(source.path, source.subfolder)
    found = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in ADAPTER_FILES)
    if (
        not found
        or {WEIGHTS, INDEX} & {path.name for path in folder.iterdir()}
        or any(folder.glob("pytorch_model*.bin*"))
    ):
        return
    shards = [name for name in found if _SHARD.search(name)]
    index = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    if shards and not index:
        raise WeightsError(
            f"{source.name}: {len(shards)} shards ({shards[0]}, …) without their index, {INDEX}: which of "
            "them belong together is not known. Fetch the index too."
        )
    names = ", ".join(f"{source.name.rstrip('/')}/{name}" for name in (index or found)[:_MOST_TOLD])
    raise WeightsError(f"{source.name}: no {WEIGHTS} there. Name the file of weights: {names}.")


def survey(source: Source, read: Sequence[str]) -> Contents:
    """Find what a local folder holds besides the files that are read.

    Raises:
        WeightsError: it holds a second set of weights with other values, or two shards hold one tensor with
            two values.
    """
    if source.kind != "folder" or not read:
        return Contents()
    folder = Path(source.path, source.subfolder)
    _refuse_double(source, read)
    names = {Path(path).name for path in read}
    others = sorted({path.name for pattern in _WEIGHTS for path in folder.glob(pattern)} - names)
    if not others:
        return Contents()
    unread: list[Unread] = []
    for title, files in _sets(folder, others, names):
        unread += _compare(source, folder, read, (title, files))
    known = {each.name for each in unread}
    newest = max(Path(path).stat().st_mtime for path in read)
    for name in others:
        if name not in known:
            is_newer = (folder / name).stat().st_mtime > newest
            unread.append(Unread(name, str(folder / name), said="newer" if is_newer else ""))
    read_from = source.weights_file or (INDEX if len(read) > 1 else Path(read[0]).name)
    told = [f"{each.name} ({each.said})" if each.said else each.name for each in unread]
    listed = ", ".join(told[:_MOST_TOLD]) + (
        f" and {len(told) - _MOST_TOLD} more" if told[_MOST_TOLD:] else ""
    )
    note = f"{source.name}: the weights were read from {read_from}; not read: {listed}"
    return Contents((note,), tuple(unread))


def _sets(folder: Path, others: Iterable[str], read: set[str]) -> Iterator[tuple[str, list[str]]]:
    """The other sets of safetensors that a user could name: the name to give, and the files."""
    left = [n for n in others if n.endswith(".safetensors") and n not in ADAPTER_FILES]
    for index in sorted(path.name for path in folder.glob("*.safetensors.index.json")):
        try:
            files = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        if files <= read:
            continue
        yield index, sorted(files)
        left = [name for name in left if name not in files]
    for name in left:
        if not _SHARD.search(name):
            yield name, [name]


def _compare(source: Source, folder: Path, read: Sequence[str], other: tuple[str, list[str]]) -> list[Unread]:
    """What is known of another set of weights.

    Raises:
        WeightsError: it is as whole as the one that is read, holds other values, and neither was named.
    """
    title, files = other
    paths = [str(folder / name) for name in files]
    there = [name for name in files if (folder / name).is_file()]

    def unread(said: str, *, is_copy: bool = False) -> list[Unread]:
        return [Unread(name, str(folder / name), is_copy, f"{said} {title}".strip()) for name in there]

    if len(there) < len(files):
        return unread("part of the incomplete")
    try:
        ours, theirs = read_headers(read), read_headers(paths)
    except (SafetensorError, OSError, ValueError, KeyError):
        return unread("of the unreadable")
    usual = title in (WEIGHTS, INDEX)
    if not usual and ours.keys() != theirs.keys():
        return []  # a set of another tool, under names of its own
    differing = [key for key in ours if key not in theirs or not same_numbers(ours[key], theirs[key])]
    if not differing and ours.keys() == theirs.keys():
        return unread("the same weights" if len(files) == 1 else "the same weights:", is_copy=True)
    if source.weights_file or _VARIANT.search(title):
        return unread("a variant" if _VARIANT.search(title) else "of", is_copy=False)
    mine = INDEX if len(read) > 1 else Path(read[0]).name
    place = f"{source.name.rstrip('/')}{'/' + source.subfolder if source.subfolder else ''}"
    first = min(differing, default=min(theirs.keys() - ours.keys(), default=""))
    raise WeightsError(
        f"{source.name}: holds two sets of weights, {mine} and {title}, and they differ, first in {first}. "
        f"Say which: {place}/{mine} or {place}/{title}. Or delete the one that is left over."
    )


def _refuse_double(source: Source, read: Sequence[str]) -> None:
    """Refuse shards of which two hold one tensor with two values: which counts would be chance."""
    safetensors = [path for path in read if path.endswith(".safetensors")]
    seen: dict[str, str] = {}
    for path in safetensors if len(safetensors) > 1 else ():
        for key in read_headers([path]):
            first = seen.setdefault(key, path)
            if first != path and not same_numbers(read_headers([first])[key], read_headers([path])[key]):
                raise WeightsError(
                    f"{source.name}: {key} is in two of its files with two values: {Path(first).name} and "
                    f"{Path(path).name}. They are shards of two checkpoints: delete the one that is left "
                    "over, or save the model again."
                )
