"""The folder of a run: what run it belongs to, and a file for each shard that is done."""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from lazarus.errors import SaveError, UsageError
from lazarus.foreign import UnreadableError, content, decoded, user_path
from lazarus.messages import option
from lazarus.metrics import AccumulatorState
from lazarus.ranks import Rank

MANIFEST = "manifest.json"
FEWEST_SHARDS = 64
SHARDS_A_PROCESS = 8
"""So that no process waits long for another's last shard."""

_ADVICE = f"Give another {option('work_dir')}, or delete this one."
_PART = ".part"
_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What numpy and zipfile raise for a file whose bytes are not those that were written."""


class WorkFolder:
    """A folder that processes share: the manifest of their run, and what each shard has accumulated.

    Files appear whole or not at all: each is written beside its place, under its lock, and renamed.
    """

    def __init__(self, path: Path, rank: Rank) -> None:
        self.path = path
        self._named = option("work_dir", path)
        self.rank = rank
        self.most_shards = 0
        """into how many shards the run is cut, at most; known when it has begun"""

    @classmethod
    def open(cls, path: str, rank: Rank) -> WorkFolder:
        """Make the folder, or take up the one that is there.

        Raises:
            UsageError: it cannot be written, holds what is not ours, or its manifest cannot be read.
        """
        folder = cls(user_path(path), rank)
        try:
            folder._check_place()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{option('work_dir', path)}: cannot be written: {reason}. Choose another folder, or allow "
                "writing there.",
                option="work_dir",
            ) from error
        if folder._manifest.exists():
            folder._read_manifest()
        return folder

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Begin the run, or take it up where another process has begun it.

        Raises:
            UsageError: the folder belongs to another run.
            SaveError: the disk gave out.
        """
        # The first process writes the manifest, and all of them read what it has written.
        with self._locked(MANIFEST):
            if not self._manifest.exists():
                shards = max(FEWEST_SHARDS, SHARDS_A_PROCESS * self.rank.world)
                self._write_manifest({"fingerprint": fingerprint, "most_shards": shards})
            found = self._read_manifest()
        # Through JSON as the other one was: tuples are lists there.
        self._check_same(found["fingerprint"], json.loads(json.dumps(fingerprint)))
        self.most_shards = found["most_shards"]

    @contextmanager
    def claimed(self, number: int) -> Iterator[bool]:
        """Hold the lock of a shard while the context lasts; yields whether this process has got it.

        Raises:
            SaveError: the disk does not lock files.
        """
        with self._locked(self._shard(number).name, timeout_seconds=0) as ours:
            yield ours

    def read(self, number: int) -> AccumulatorState | None:
        """Return what a shard has accumulated; None where its file is absent or damaged."""
        path = self._shard(number)
        if not path.exists():
            return None
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except _DAMAGE:  # no file of ours: it is run again, and replaced
            return None

    def write(self, number: int, state: Mapping[str, NDArray[Any]]) -> None:
        """Write what a shard has accumulated; its lock is held.

        Raises:
            SaveError: the disk gave out.
        """

        def save(part: Path) -> None:
            with part.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **dict(state))
                stream.flush()
                # The new name may reach the disk before the bytes do, and a crash would leave an empty shard.
                os.fsync(stream.fileno())

        self._replace(self._shard(number), save)

    def forget(self, number: int) -> None:
        """Let a shard run again: what it has written elsewhere is gone."""
        self._shard(number).unlink(missing_ok=True)

    def _check_place(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        # Another process may be about to write the manifest: its lock and its part are no foreign files.
        foreign = sorted(p.name for p in self.path.iterdir() if not p.name.startswith(MANIFEST))
        if foreign and not self._manifest.exists():
            raise UsageError(
                f"{self._named}: this folder holds {foreign[0]!r}, and is no folder of a run. Name "
                "one that is empty, or that is not there yet.",
                option="work_dir",
            )
        # mkdir says nothing of a folder that is there already. By the process id: several may probe at once.
        probe = self.path / f"{MANIFEST}.{os.getpid()}{_PART}"
        probe.touch()
        probe.unlink(missing_ok=True)

    def _check_same(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if not differing:
            return
        told = "; ".join(f"{key} was {theirs.get(key)}, is {ours.get(key)}" for key in differing)
        raise UsageError(f"{self._named}: it belongs to another run: {told}. {_ADVICE}", option="work_dir")

    def _read_manifest(self) -> dict[str, Any]:
        try:
            found = decoded(content(self._manifest))
            kinds = {"fingerprint": dict, "most_shards": int}
            is_whole = all(isinstance(found[name], kind) for name, kind in kinds.items())
            if is_whole and found["most_shards"] >= 1:
                return dict(found)
            fault: object = "it is not what lazarus writes"
        except (UnreadableError, KeyError, TypeError) as error:
            fault = error
        raise UsageError(f"{self._named}: {MANIFEST} cannot be read: {fault}. {_ADVICE}", option="work_dir")

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        def save(part: Path) -> None:
            with part.open("w", encoding="utf-8") as stream:
                json.dump(manifest, stream, indent=2, ensure_ascii=False)
                stream.flush()
                os.fsync(stream.fileno())

        self._replace(self._manifest, save)

    def _replace(self, path: Path, save: Callable[[Path], None]) -> None:
        part = path.with_name(path.name + _PART)
        try:
            save(part)
            part.replace(path)
        except OSError as error:
            raise SaveError(
                f"{self._named}: {path.name} could not be written: {error.strerror or error}. Make "
                "room there and run again: what is done is kept.",
                option="work_dir",
            ) from error
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, name: str, timeout_seconds: float = -1) -> Iterator[bool]:
        lock = FileLock(self.path / f"{name}.lock")
        try:
            lock.acquire(timeout=timeout_seconds)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise SaveError(
                f"{self._named}: {name} cannot be locked: {error.strerror or error}. Choose a "
                "folder on a disk that locks files, and that all processes may write.",
                option="work_dir",
            ) from error
        try:
            yield True
        finally:
            lock.release()

    def _shard(self, number: int) -> Path:
        return self.path / f"shard-{number:04d}.npz"

    @property
    def _manifest(self) -> Path:
        return self.path / MANIFEST
