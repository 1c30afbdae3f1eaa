"""The SHA-256 of files. Those of large files are kept, by what tells whether a file is still the same."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Lock

from huggingface_hub import cached_assets_path, constants

from lazarus.errors import WeightsError

_KEPT_FROM = 2**24
"""files from this size on have their digest kept, in bytes: smaller ones take a hundredth of a second"""
_KNOWN: dict[str, str] = {}
"""the digests that this process has computed"""
_LOCK = Lock()
_SHA256 = re.compile("[0-9a-f]{64}")
_SHA1 = re.compile("[0-9a-f]{40}")


def sha256_of(path: str) -> str | None:
    """Return the SHA-256 of a file, in hexadecimal; None where it cannot be read."""
    # One file at a time: base and fine-tuned may stand on the same one, and a disk reads one at a time best.
    with _LOCK:
        try:
            with open(path, "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                key = _key(path, found)
                kept = _folder() if found.st_size >= _KEPT_FROM else None
                known = _KNOWN.get(key) or (None if kept is None else _kept(kept / key))
                if known is not None:
                    return known
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if _key(path, os.fstat(file.fileno())) == key:
                    _KNOWN[key] = digest
                    if kept is not None:
                        _keep(kept / key, digest)
                return digest
        except OSError:
            return None


def check_hub_digest(model: str, path: str, sha256: str | None) -> None:
    """Refuse a file of the Hub's cache whose bytes are not those of which the Hub gave the digest.

    Raises:
        WeightsError: they are not.
    """
    if sha256 is None or is_right_blob(path, sha256) is not False:
        return
    blob = Path(path).resolve()
    raise WeightsError(
        f"{model}: {Path(path).name} is not what the Hub holds: the digest of its bytes is not "
        f"{blob.name[:12]}…. It was damaged or changed: delete {blob}, and run again to have it fetched."
    )


def is_right_blob(path: str, sha256: str | None = None) -> bool | None:
    """Return whether a file in the Hub's cache has the digest that the Hub gave; None if it gave none.

    `sha256` is the digest of its bytes, where it is known already.

    Raises:
        OSError: the file cannot be read.
    """
    blob = Path(path).resolve()
    if blob.parent.name != "blobs":
        return None
    # The cache names a large file by its SHA-256, and a small one by git's SHA-1 of it.
    if _SHA256.fullmatch(blob.name):
        return blob.name == (sha256 or sha256_of(path))
    if _SHA1.fullmatch(blob.name):
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest() == blob.name
    return None


def _key(path: str, found: os.stat_result) -> str:
    """Return a name for a file as it is: another file, or other contents, has another one."""
    identity = [
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        # Nobody can set this one back, so bytes that were changed behind the other times are hashed again.
        found.st_ctime_ns,
    ]
    return hashlib.sha256(f"{os.path.realpath(path)} {identity}".encode()).hexdigest()


def _folder() -> Path | None:
    """Return where digests are kept; None where nothing can be kept."""
    try:
        return Path(cached_assets_path("lazarus", namespace="digests", assets_dir=constants.HF_ASSETS_CACHE))
    except (OSError, ValueError):  # a cache that cannot be written costs time, and nothing else
        return None


def _kept(place: Path) -> str | None:
    try:
        found = place.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return found if _SHA256.fullmatch(found) else None


def _keep(place: Path, digest: str) -> None:
    with suppress(OSError):
        handle, part = tempfile.mkstemp(dir=place.parent)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(digest)
            os.replace(part, place)
        except OSError:
            os.unlink(part)
            raise
