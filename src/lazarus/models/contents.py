"""Files in a folder besides the weights that are read: other sets of weights, in any format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from lazarus.errors import WeightsError
from lazarus.foreign import UnreadableError, content, decoded, read_json
from lazarus.models.inside import check_plain
from lazarus.models.reference import ADAPTER_FILES, INDEX, WEIGHTS, Source
from lazarus.models.stored import StoredTensor, read_headers, same_elements
from lazarus.notes import Note

_WEIGHTS = (
    "*.safetensors",
    "pytorch_model*.bin",
    "consolidated*.pth",
    "*.gguf",
    "tf_model*.h5",
    "flax_model*.msgpack",
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|int8)(?=[.-])")
"""what `variant=` puts into the names of the files of another dtype"""
_MOST_TOLD = 6


@dataclass(frozen=True)
class Unread:
    """A set of weights that was not read: one file, or the files of an index."""

    name: str
    paths: tuple[str, ...]
    is_copy: bool = False
    """it holds the weights that were read, bit for bit"""
    said: str = ""
    """what is known of it"""

    def __str__(self) -> str:
        return f"{self.name} ({self.said})" if self.said else self.name


@dataclass(frozen=True)
class Contents:
    """The contents of a folder besides the weights that are read."""

    note: Note | None = None
    unread: tuple[Unread, ...] = ()


NOTHING_BESIDE = Contents()


def look_for_weights(source: Source) -> None:
    """Refuse a local folder whose safetensors have names that are not looked for.

    Raises:
        WeightsError: the weights are there under other names, or their index is not, or is none.
    """
    folder = Path(source.path, source.subfolder)
    if source.kind != "folder":
        return
    named = source.weights_file or ""
    index_file = folder / (named if named.endswith(".index.json") else INDEX)
    if index_file.is_file():
        read_index(source, index_file)
    if source.weights_file or any(folder.glob("pytorch_model*.bin*")):
        return
    found = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in ADAPTER_FILES)
    if not found or (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return
    index = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    shards = [name for name in found if _SHARD.search(name)]
    if shards and not index:
        raise WeightsError(
            f"{source.name}: {len(shards)} shards of weights, first {shards[0]}, without their index "
            f"{INDEX}: whether they are all is not known. Fetch the index too."
        )
    names = ", ".join(f"{source.folder_name}/{name}" for name in (index or found)[:_MOST_TOLD])
    raise WeightsError(f"{source.name}: no {WEIGHTS} there. Name the file of weights: {names}.")


def read_index(source: Source, path: Path, ending: str = ".safetensors") -> list[str]:
    """Return the names of the files with that ending that an index lists, before another library reads it.

    Raises:
        WeightsError: it is none, or names what is no file of weights in its folder.
    """
    index = read_json(path, WeightsError, "Fetch it again.")
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise WeightsError(
            f"{source.name}: {path.name} has no weight_map, which says in which file each tensor is. Fetch "
            "it again."
        )
    check_plain(source.name, index["weight_map"], ending, path.name)
    return sorted(set(index["weight_map"].values()))


def survey(source: Source, read: Sequence[str]) -> Contents:
    """Return what a local folder holds besides the files of weights that are read.

    Raises:
        WeightsError: it holds a second set of weights with other values and neither was named, or two shards
            hold one tensor with two values.
    """
    if source.kind != "folder" or not read:
        return NOTHING_BESIDE
    folder = Path(source.path, source.subfolder)
    _refuse_double(source, read)
    names = {Path(path).name for path in read}
    files = {path.name for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()}
    others = sorted(files - names - {*ADAPTER_FILES})
    if not others:
        return NOTHING_BESIDE
    unread = [_compare(source, read, each) for each in _sets(folder, others, names)]
    # Of files in other formats only the age is reported. They are not opened: a pickle could run code.
    known = {Path(path).name for each in unread for path in each.paths}
    newest = max(Path(path).stat().st_mtime for path in read)
    for name in others:
        if name not in known:
            said = "newer than what was read" if (folder / name).stat().st_mtime > newest else ""
            unread.append(Unread(name, (str(folder / name),), said=said))
    told = ", ".join(map(str, unread[:_MOST_TOLD]))
    more = f" and {len(unread) - _MOST_TOLD} more" if len(unread) > _MOST_TOLD else ""
    text = f"{source.name}: its weights were read from {_called(source, read)}, and not from {told}{more}"
    return Contents(Note("other-weights", text, source.name), tuple(unread))


def _called(source: Source, read: Sequence[str]) -> str:
    """Return the name of the file that a user would give for what is read."""
    if source.weights_file or len(read) == 1:
        return source.weights_file or Path(read[0]).name
    return INDEX if read[0].endswith(".safetensors") else "pytorch_model.bin.index.json"


def _sets(folder: Path, others: Iterable[str], read: set[str]) -> Iterator[Unread]:
    """Yield the other sets of safetensors that a user could name."""
    left = [name for name in others if name.endswith(".safetensors") and not _SHARD.search(name)]
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            files = {*decoded(content(index))["weight_map"].values()}
        except (UnreadableError, TypeError, KeyError, AttributeError):
            continue  # it is not read, and what its files are nobody says
        if not files <= read:
            left = [name for name in left if name not in files]
            yield Unread(index.name, tuple(str(folder / name) for name in sorted(files)))
    for name in left:
        yield Unread(name, (str(folder / name),))


def _compare(source: Source, read: Sequence[str], other: Unread) -> Unread:
    """Return another set of weights with what is known of it.

    Raises:
        WeightsError: it is as whole as the one that is read, holds other values, and neither was named.
    """
    absent = [path for path in other.paths if not Path(path).is_file()]
    there = tuple(path for path in other.paths if path not in absent)
    if absent:
        said = f"{len(absent)} of its {len(other.paths)} files are absent"
        return Unread(other.name, there, said=said)
    if not all(path.endswith(".safetensors") for path in read):
        return other
    try:
        ours, theirs = read_headers(read), read_headers(other.paths)
    except (SafetensorError, OSError, ValueError, KeyError):
        return Unread(other.name, there, said="unreadable")
    # Under a name that transformers looks for it counts as this model's weights, whatever its keys are.
    if ours.keys() != theirs.keys() and other.name not in (WEIGHTS, INDEX):
        return other  # the set of another tool, under names of its own
    keys = sorted(ours.keys() | theirs.keys())
    differing = (k for k in keys if k not in ours or k not in theirs or not same_elements(ours[k], theirs[k]))
    first = next(differing, None)
    if first is None:
        return Unread(other.name, there, is_copy=True, said="the same weights")
    # A variant is rounded to another dtype, so other values are expected of it.
    if _VARIANT.search(other.name):
        return Unread(other.name, there, said="a variant")
    if source.weights_file:
        return Unread(other.name, there, said="other weights")
    folder, mine = source.folder_name, _called(source, read)
    raise WeightsError(
        f"{source.name}: holds two sets of weights, {mine} and {other.name}, and they differ, first in "
        f"{first}. Say which: {folder}/{mine} or {folder}/{other.name}. Or delete the one that is left over."
    )


def _refuse_double(source: Source, read: Sequence[str]) -> None:
    """Refuse shards of which two hold one tensor with two values: which counts would be chance."""
    seen: dict[str, StoredTensor] = {}
    for path in read if len(read) > 1 and all(each.endswith(".safetensors") for each in read) else ():
        for key, stored in read_headers([path]).items():
            first = seen.setdefault(key, stored)
            if first is not stored and not same_elements(first, stored):
                raise WeightsError(
                    f"{source.name}: {key} is in two of its files with two values: {Path(first.path).name} "
                    f"and {Path(path).name}. They are shards of two checkpoints: delete those that are left "
                    "over, or save the model again."
                )
