"""The files that a model is read from: whether they stay as they were, and their SHA-256."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from lazarus.errors import WeightsError
from lazarus.models.digests import check_hub_digest, sha256_of
from lazarus.notes import Notes
from lazarus.results import ReadFile

_SETTINGS = (
    "config.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "quant*.json",
    "hf_quant_config.json",
    "modules.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "merges.txt",
    "vocab.*",
    "*.model",
    "tekken.json",
    "*.py",
)
"""files that decide what the weights mean, and what is read as which token"""


class FileChangedError(OSError):
    """A file is no longer the one that was opened first."""


class NotAFileError(OSError):
    """A device, a pipe or a folder stands where a file should."""


@dataclass(frozen=True)
class Identity:
    """A file at one time: another file under its name, or other contents, have another identity.

    The time of the last change of its inode is left out: a new link to it, or other rights, change that.
    """

    device: int
    inode: int
    n_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str, found: os.stat_result | None = None) -> Identity:
        """Return the identity of a file: of what an open descriptor of it has `found`, or of its path.

        Raises:
            NotAFileError: it is a device, a pipe or a folder, which may have no end.
            OSError: it is not there.
        """
        found = found or os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise NotAFileError(f"{path} is no regular file")
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class _File:
    name: str
    """in the folder that the user named"""
    path: str
    identity: Identity


class ReadFiles:
    """The files of one model, as they were when each was added, before it was read."""

    def __init__(self, model: str, files: Iterable[_File] = (), *, hashed: bool = True) -> None:
        """Begin with some files of what the user calls `model`; without `hashed` no digest is told."""
        self.model = model
        self.hashed = hashed
        self._files = {file.name: file for file in files}
        self._is_read = False
        self._digests: dict[str, str | None] = {}
        self._hashing: Thread | None = None

    def add(self, root: str | Path, paths: Iterable[str | Path], prefix: str = "") -> None:
        """Add files that are about to be read, by their names in the folder `root`; those known stay.

        Raises:
            OSError: one is not there, or is no file.
        """
        for path in map(str, paths):
            name = prefix + Path(os.path.relpath(path, root)).as_posix()
            if name not in self._files:
                self._files[name] = _File(name, path, Identity.of(path))

    def add_settings(self, folder: Path, prefix: str = "") -> None:
        """Add the files of settings and of the tokenizer that a folder holds."""
        there = [path for name in _SETTINGS for path in sorted(folder.glob(name)) if path.is_file()]
        self.add(folder, there, prefix)

    def joined(self, others: ReadFiles) -> ReadFiles:
        """Return the files of both, as those of one model that is called as this one is."""
        both = [*self._files.values(), *others._files.values()]
        return ReadFiles(self.model, both, hashed=self.hashed)

    def check(self) -> None:
        """Refuse a model whose files have changed since this was made.

        Raises:
            WeightsError: it names the first that has.
        """
        if changed := self._changed():
            raise WeightsError(
                f"{self.model}: {changed[0]} changed while it was read, so what was read may be of two "
                "states. Run again when nothing writes there."
            )

    def all_read(self) -> None:
        """Check the files for the last time: whatever was needed of them is in memory.

        Raises:
            WeightsError: one has changed meanwhile.
        """
        self.check()
        self._is_read = True

    def start_hashing(self) -> None:
        """Begin to compute the digests, beside what this process does; no file may be added from now on."""
        if self._hashing is None:
            # A daemon: a run that fails does not wait for the digests of a large model.
            self._hashing = Thread(target=self._hash, name="lazarus-digests", daemon=True)
            self._hashing.start()

    def digests(self) -> dict[str, str | None]:
        """Return the SHA-256 of each file by its name; None for one that has changed since it was read.

        Raises:
            WeightsError: a file is not what the Hub says, or changed while it was read.
        """
        self.start_hashing()
        assert self._hashing is not None
        self._hashing.join()
        for file in list(self._files.values()):
            check_hub_digest(self.model, file.path, self._digests.get(file.name))
        if not self._is_read:
            self.check()
        return dict(self._digests)

    def told(self, notes: Notes) -> list[ReadFile]:
        """Return the files for a result, and note those that changed after they had been read.

        Raises:
            WeightsError: a file is not what the Hub says, or changed while it was read.
        """
        known = self.digests() if self.hashed else {}
        if not self._is_read:
            self.check()
        if changed := self._changed():
            notes.add(
                "files-changed",
                f"{self.model}: {', '.join(changed)} changed after it had been read: the result is of what "
                "was read, and not of what is there now",
                model=self.model,
            )
        return [
            ReadFile(name=f.name, bytes=f.identity.n_bytes, sha256=known.get(f.name))
            for f in self._files.values()
        ]

    def _changed(self) -> list[str]:
        return [file.name for file in self._files.values() if not _is_same(file)]

    def _hash(self) -> None:
        for file in list(self._files.values()):
            found = sha256_of(file.path)
            # Taken after the digest: what was hashed is what was read, or it is not told.
            self._digests[file.name] = found if _is_same(file) else None


def _is_same(file: _File) -> bool:
    try:
        return Identity.of(file.path) == file.identity
    except OSError:
        return False


def same_file(path: str, descriptor: int, before: Identity | None) -> None:
    """Check that an open file is the one that was opened first.

    Raises:
        FileChangedError: it is another one, or was written to.
    """
    if before is not None and Identity.of(path, os.fstat(descriptor)) != before:
        raise FileChangedError(f"{Path(path).name} changed while it was read")
