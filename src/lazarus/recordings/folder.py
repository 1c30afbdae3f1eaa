"""The folder of a recording: who writes into it, and recording.json, whole or not there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from lazarus.errors import SaveError, UsageError
from lazarus.foreign import user_path
from lazarus.recordings.format import MANIFEST, Contents, write
from lazarus.recordings.tensors import PART
from lazarus.scratch import free, locked

_OURS = r"\d{5}\.safetensors(\.part)?"
_CLAIM = ".recording"


class Claim:
    """The mark that a recording is being written: a lock, which is free when its process is gone.

    It tells files of a process that was killed, which the next one removes, from files of somebody else.
    """

    def __init__(self, folder: Path) -> None:
        """Mark a folder.

        Raises:
            UsageError: another process has marked it.
            SaveError: the disk gave out.
        """
        self._lock = FileLock(folder / _CLAIM)
        try:
            self.is_held = locked(self._lock)
        except Timeout as error:
            raise UsageError(f"{folder}: another process records into it. Name another folder.") from error
        except OSError as error:
            raise SaveError(
                f"{folder}: cannot be written: {error.strerror or error}. Make room there."
            ) from error

    def release(self) -> None:
        """Take the mark away."""
        free(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.release()


def make_folder(folder: str | Path, *, taken_up: bool = False) -> Path:
    """Make the folder of a recording; one that is `taken_up` may hold files of tensors.

    What a process left that was killed while it recorded is removed.

    Raises:
        UsageError: it holds something, or cannot be made.
    """
    path = user_path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if (path / _CLAIM).exists():
            _remove_what_is_left(path)
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


def _remove_what_is_left(path: Path) -> None:
    with Claim(path) as claim:
        # On a disk without locks nothing tells that the process is gone.
        if claim.is_held and not (path / MANIFEST).exists():
            remove_written(path)


def remove_written(path: Path) -> None:
    """Remove what a recording that is not whole has written to its folder; the mark of a `Claim` stays."""
    for file in path.iterdir():
        if re.fullmatch(_OURS, file.name) or file.name.startswith(MANIFEST):
            file.unlink()


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
        raise SaveError(f"{path}: cannot be written: {error.strerror or error}. Make room there.") from error
    finally:
        part.unlink(missing_ok=True)
