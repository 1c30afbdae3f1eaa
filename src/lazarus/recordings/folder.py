"""The folder of a recording, and recording.json in it, whole or not there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from lazarus.errors import SaveError, UsageError
from lazarus.foreign import user_path
from lazarus.recordings.format import MANIFEST, Contents, write
from lazarus.recordings.tensors import PART

_OURS = r"\d{5}\.safetensors(\.part)?"


def make_folder(folder: str | Path, *, taken_up: bool = False) -> Path:
    """Make the folder of a recording; one that is `taken_up` may hold files of tensors.

    Raises:
        UsageError: it holds something, or cannot be made.
    """
    path = user_path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = sorted(entry.name for entry in path.iterdir())
        held = [name for name in held if not (taken_up and re.fullmatch(_OURS, name))]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be written: {reason}. Choose another folder.") from error
    if held:
        raise UsageError(
            f"{path}: the folder of a recording is empty at first, and this one holds {held[0]!r}. Name "
            "another one."
        )
    return path


def write_manifest(path: Path, contents: Contents) -> None:
    """Write recording.json, whole or not at all.

    Raises:
        SaveError: the disk gave out.
    """

    def save(part: Path) -> None:
        with part.open("wb") as stream:
            write(contents, stream)
            stream.flush()
            os.fsync(stream.fileno())

    _replace(path / MANIFEST, save)


def _replace(path: Path, save: Callable[[Path], None]) -> None:
    # By the process: several that share a run write the same.
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        save(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SaveError(f"{path}: cannot be written: {error.strerror or error}. Make room there.") from error
