"""Temporary folders of which nothing is left: not after an error, nor for long where a process is killed.

A process that is killed removes nothing. But its lock on the folder is free, and whoever makes the next
folder beside it removes what nobody holds any more.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

PREFIX = ".lazarus-"
_LOCK = "lock"
_ATTEMPTS = 3
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""what the system says of a disk without locks, as some network file systems are"""


def locked(lock: FileLock) -> bool:
    """Take a lock without waiting, and return whether it is held: False where the disk has no locks.

    Raises:
        Timeout: another process holds it.
        OSError: its file cannot be made.
    """
    try:
        lock.acquire(blocking=False)
    except NotImplementedError:  # what older versions of filelock make of ENOSYS
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def free(lock: FileLock) -> None:
    """Release a lock, and remove its file."""
    path = Path(lock.lock_file)
    try:
        # Before it is free, so that it is not the lock of the next process that is removed.
        path.unlink(missing_ok=True)
    except PermissionError:  # Windows removes no file that is open
        lock.release()
        with suppress(OSError):  # the next process has it
            path.unlink(missing_ok=True)
    else:
        lock.release()


_HELD: set[ScratchFolder] = set()
"""the folders of this process that are not removed yet"""


class ScratchFolder:
    """A folder for temporary files: it goes with `remove`, with its context, or after its process."""

    def __init__(self, parent: str | Path | None = None) -> None:
        """Make the folder in `parent`, by default where temporary files go, and remove the dead ones there.

        Raises:
            OSError: no folder can be made there.
        """
        place = Path(parent or tempfile.gettempdir())
        _sweep(place)
        for attempt in range(_ATTEMPTS):
            self.path = Path(tempfile.mkdtemp(dir=place, prefix=PREFIX))
            self._lock = FileLock(self.path / _LOCK)
            # Another process may have taken the folder for a dead one before it was locked.
            with suppress(Timeout, FileNotFoundError):
                # Without locks no other process takes it for dead.
                if not locked(self._lock) or self.path.exists():
                    break
                self._lock.release()
            # Older versions of filelock tell a disk without locks from a lock that is held for ENOSYS alone.
            if attempt < _ATTEMPTS - 1:
                shutil.rmtree(self.path, ignore_errors=True)
        _HELD.add(self)

    def remove(self) -> None:
        """Remove the folder, with all that is in it."""
        _HELD.discard(self)
        _remove(self.path, self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.remove()


def remove_all() -> None:
    """Remove the folders that this process still has, at its end.

    A context in a generator that was left in the midst of it ends when the generator is collected, and as
    long as somebody keeps the trace of the error, it is not.
    """
    for folder in list(_HELD):
        folder.remove()


def _sweep(place: Path) -> None:
    """Remove the scratch folders whose processes are gone, as far as they are this user's."""
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False) and _is_own(entry):
                _remove_if_dead(Path(entry.path))


def _is_own(entry: os.DirEntry[str]) -> bool:
    return not hasattr(os, "getuid") or entry.stat(follow_symlinks=False).st_uid == os.getuid()


def _remove_if_dead(folder: Path) -> None:
    if not (folder / _LOCK).exists():
        with suppress(OSError):  # it holds something, and nothing tells that it is ours
            folder.rmdir()
        return
    lock = FileLock(folder / _LOCK)
    with suppress(Timeout, OSError):
        if locked(lock):
            _remove(folder, lock)


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    # Windows removes no file that is open, such as that of the lock.
    shutil.rmtree(folder, ignore_errors=True)
