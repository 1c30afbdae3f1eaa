"""Which files of a model's folder may be read: regular ones, in the folder itself, under plain names.

A folder may come from a stranger. A link in it can lead to any file of whoever compares it, and an index can
name one; what was read would then stand in a message or in a result.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from huggingface_hub import constants

from lazarus.errors import ModelError, WeightsError

FOLLOW_LINKS = "LAZARUS_FOLLOW_LINKS"
"""the environment variable that allows links out of a folder, where it is 1"""
_READ = {".bin", ".gguf", ".jinja", ".json", ".model", ".py", ".safetensors", ".tiktoken", ".txt"}
"""endings of the files that a loader reads"""
_TEMPLATES = "additional_chat_templates"
"""the folder in a model's folder from which transformers reads further chat templates"""
_MOST_BYTES_OF_A_NAME = 255
"""the limit of almost every file system"""


def check_files(name: str, folder: Path) -> None:
    """Refuse a folder in which a loader may read a device, a pipe, or a link that leads out of it.

    Links into the Hub's cache are followed: the cache itself is made of them.

    Raises:
        ModelError: it says which file, and where it leads.
    """
    root = os.path.realpath(folder)
    try:
        entries = list(_entries(folder, has_modules=(folder / "modules.json").exists()))
    except OSError as error:
        raise ModelError(
            f"{name}: this folder cannot be looked into: {error.strerror}. Name another, or allow reading it."
        ) from error
    for entry in entries:
        try:
            found = os.stat(entry.path)
        except OSError:
            continue  # a link that leads nowhere is missed where it is needed
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise ModelError(
                f"{name}: {entry.name} is a device or a pipe, and no file. Put the file itself there."
            )
        place = os.path.realpath(entry.path)
        if place != entry.path and not _may_lead(root, place):
            raise ModelError(
                f"{name}: {entry.name} is a link out of this folder, to {place}. In a stranger's folder it "
                "could show a file of yours. Put a copy of that file there, or allow such links with "
                f"{FOLLOW_LINKS}=1."
            )


def check_plain(
    name: str, listed: Mapping[object, object] | Iterable[object], ending: str, what: str
) -> None:
    """Refuse names of files that are no plain names with an ending, such as an index may hold.

    Raises:
        WeightsError: it says which one, and `what` lists it.
    """
    # No set: a stranger's index may name what cannot be in one.
    for each in listed.values() if isinstance(listed, Mapping) else listed:
        if not isinstance(each, str) or not is_plain(each) or not each.endswith(ending):
            raise WeightsError(
                f"{name}: {what} names {each!r:.80}, and a file of weights has a plain name that ends with "
                f"{ending}. Fetch it again, or load the model where you trust it and write it again with "
                "save_pretrained."
            )


def is_plain(name: str) -> bool:
    """Return whether a name can be that of a file in a folder, and of nothing elsewhere."""
    is_name = name == os.path.basename(name) and name != ".." and not {"\\", "\0"}.intersection(name)
    return is_name and len(name.encode("utf-8", "surrogatepass")) <= _MOST_BYTES_OF_A_NAME


def _entries(root: Path, *, has_modules: bool) -> Iterator[os.DirEntry[str]]:
    """Yield the files and links in a folder that a loader may read; with modules, in all folders of it."""
    folders: list[str | Path] = [root]
    while folders:
        with os.scandir(folders.pop()) as found:
            entries = list(found)
        for entry in entries:
            is_opened = has_modules or entry.name == _TEMPLATES
            if entry.is_dir(follow_symlinks=False):
                folders += [entry.path] if is_opened else []
            # A link to a folder is a way out as well. What it leads to is not looked into: it is refused, or
            # within the root, where it is found without the link.
            elif _is_read(entry) or (is_opened and entry.is_symlink()):
                yield entry


def _is_read(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in _READ


def _may_lead(root: str, place: str) -> bool:
    """Return whether a link from a folder may lead to a place."""
    # In a snapshot of a cache that was moved, links lead to the blobs beside it.
    blobs = os.path.join(os.path.dirname(os.path.dirname(root)), "blobs")
    is_snapshot = os.path.basename(os.path.dirname(root)) == "snapshots"
    allowed = [root, os.path.realpath(constants.HF_HUB_CACHE), *([blobs] if is_snapshot else [])]
    return os.environ.get(FOLLOW_LINKS) == "1" or any(Path(place).is_relative_to(each) for each in allowed)
