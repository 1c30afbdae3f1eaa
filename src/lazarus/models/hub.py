"""Repositories of the Hub: the commit that a name stands for, and the files of that commit.

The Hub is asked once, when a name is read, for the commit and the list of its files. From then on every file
is of that commit, and one that is not listed is not asked for. So a request that fails is a fault, and is
never taken for a file that does not exist. transformers finds what was fetched here in the cache, and asks
for nothing itself.

Where the Hub cannot be asked, a repository is what the cache holds of it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from lazarus.models.digests import is_right_blob
from lazarus.models.inside import is_plain

HTTP_ERRORS: tuple[Any, ...] = HfHubHTTPError.__bases__
"""OSError, and the error of the HTTP library under huggingface_hub, which has used several of them"""
TRANSPORT_ERROR: Any = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
"""the error of that library alone: no connection, no answer in time, a connection that broke"""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""what the Hub answers when it is asked too often, or is not well: later it may answer"""
LONGEST_WAIT = 30.0
"""how long the Hub may ask to wait before it is asked again, in seconds; beyond that the user is told"""
_WAITS = (1.0, 2.0)
"""before the Hub is asked a second and a third time, in seconds"""
_SETTINGS = re.compile(
    r"(?i).*\.(model|jinja|tiktoken|bpe|codes|spm|vocab|tokenizer)|"
    r"(.*(config|token|vocab|template).*|merges|dict|emoji|normalizer|tekken|byte_maps|word_\w+)\.(json|txt)"
)
"""the names of settings and of tokenizers' files; what else ends with .json or .txt may be data, and large"""
_TEMPLATES = "additional_chat_templates"
_Found = TypeVar("_Found")


class NoHubError(OSError):
    """Raised where something else than a Hub answers."""


class NoTokenError(OSError):
    """The token cannot be one: it has characters that no request can carry."""


class FetchError(OSError):
    """A file of a repository that is there could not be fetched; the cause says why."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self.file = file


class DamagedDownloadError(OSError):
    """Raised where a file came with other bytes than the Hub holds; it is no longer in the cache."""


@dataclass(frozen=True)
class Repository:
    """A repository at a commit."""

    hub_id: str
    commit: str
    listed: frozenset[str] | None = None
    """the names of its files; None where only the cache tells, or only asking for a file does"""
    unreachable: str | None = None
    """why it is read from the cache alone, on one line; None where the Hub was asked"""
    is_cached: bool = False
    """whether it is read from the cache alone"""

    def file(self, name: str) -> str | None:
        """Return the path of a file, fetched if need be; None if the repository has none of that name.

        Raises:
            OSError: it cannot be fetched, or the cache cannot be written. Errors of HTTP libraries too.
        """
        if self.listed is not None and name not in self.listed:
            return None
        known = try_to_load_from_cache(self.hub_id, name, revision=self.commit)
        if isinstance(known, str):
            return known
        if self.is_cached or (known is not None and self.listed is None):
            return None
        try:
            path = _retried(partial(hf_hub_download, self.hub_id, name, revision=self.commit))
            _check(path)
        except RemoteEntryNotFoundError as error:
            if self.listed is None:
                return None
            raise FetchError(name) from error
        except HTTP_ERRORS as error:
            raise FetchError(name) from error
        return path

    def lacks(self, name: str) -> bool:
        """Return whether a file is not in the cache, and only the Hub, which was not asked, may have it."""
        return self.is_cached and try_to_load_from_cache(self.hub_id, name, revision=self.commit) is None

    def not_cached(self) -> str:
        """Return the end of a sentence on a file that only the Hub may have, which was not asked."""
        why = "the Hub could not be asked. Run again when it can be reached."
        if is_offline_mode():
            why = "the Hub was not asked, since HF_HUB_OFFLINE is set. Unset HF_HUB_OFFLINE, and run again."
        return f"not in the cache, at commit {self.commit}, and {why}"

    def names(self) -> list[str]:
        """Return the names of its files; of those in the cache, where the Hub does not list them."""
        if self.listed is not None:
            return sorted(self.listed)
        folder = _cache_of(self.hub_id) / "snapshots" / self.commit
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def fetch_settings(self, subfolder: str) -> None:
        """Fetch the settings and the tokenizer of one of its folders, with the chat templates.

        Raises:
            OSError: one cannot be fetched. Errors of HTTP libraries too.
        """
        folders = (subfolder or ".", _TEMPLATES)
        for name in sorted(self.listed or ()):
            path = PurePosixPath(name)
            if _SETTINGS.fullmatch(path.name) and str(path.parent) in folders:
                self.file(name)


def find_repository(hub_id: str, revision: str | None) -> Repository:
    """Ask the Hub which commit a revision is at, and which files there are; ask the cache where it cannot.

    Raises:
        OSError: neither knows it. Errors of HTTP libraries too.
    """
    cached = _cached_commit(hub_id, revision)
    if is_offline_mode():
        if cached is None:
            raise LocalEntryNotFoundError(f"{hub_id} is not in the cache")
        return Repository(hub_id, cached, is_cached=True)
    try:
        return _retried(partial(_asked, hub_id, revision), is_urgent=cached is not None)
    except HTTP_ERRORS as error:
        if cached is None:
            raise
        why = None if cached == revision else _in_short(error)
        return Repository(hub_id, cached, unreachable=why, is_cached=True)


def _retried(ask: Callable[[], _Found], *, is_urgent: bool = False) -> _Found:
    """Ask the Hub, up to three times if its answer may be another a little later.

    huggingface_hub asks again for some requests and some faults, and has given up on these before. Where it
    is urgent, because the cache has an answer too, one that has no network does not wait.
    """
    waits = iter(_WAITS)
    while True:
        try:
            return ask()
        except HTTP_ERRORS as error:
            wait, asked = next(waits, None), seconds_to_wait(getattr(error, "response", None))
            if wait is None or not _may_pass(error, is_urgent=is_urgent) or (asked or 0) > LONGEST_WAIT:
                raise
            time.sleep(wait if asked is None else asked)


def _asked(hub_id: str, revision: str | None) -> Repository:
    try:
        found = HfApi().model_info(hub_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit, files = found.sha, found.siblings
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except HfHubHTTPError as error:
        # Some mirrors have the files and not this part of the Hub.
        if error.response.status_code != 404:
            raise
        return Repository(hub_id, _commit_of_a_file(hub_id, revision))
    except UnicodeEncodeError as error:
        raise NoTokenError from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NoHubError("its answer is not that of a Hub") from error
    # The cache has a folder of that name.
    if not isinstance(commit, str) or not commit or not is_plain(commit):
        raise NoHubError("its answer names no commit")
    listed = None if files is None else [each.rfilename for each in files]
    if listed is not None and not all(isinstance(name, str) for name in listed):
        raise NoHubError("its answer lists no files")
    _remember(hub_id, revision or constants.DEFAULT_REVISION, commit)
    return Repository(hub_id, commit, None if listed is None else frozenset(listed))


def _commit_of_a_file(hub_id: str, revision: str | None) -> str:
    """Return the commit that comes with a file; that there is none of that name tells it too."""
    with suppress(RemoteEntryNotFoundError):
        path = hf_hub_download(hub_id, "config.json", revision=revision)
        return Path(path).relative_to(_cache_of(hub_id) / "snapshots").parts[0]
    if (commit := _cached_commit(hub_id, revision)) is None:
        raise NoHubError("its answer names no commit")
    return commit


def _remember(hub_id: str, revision: str, commit: str) -> None:
    """Keep which commit a revision is at, for when the Hub cannot be asked, as huggingface_hub does."""
    place = _cache_of(hub_id) / "refs" / revision
    if revision == commit or _read(place) == commit:
        return
    with suppress(OSError):  # a cache that cannot be written is told where a file is fetched
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(commit, encoding="ascii")


def _cached_commit(hub_id: str, revision: str | None) -> str | None:
    """Return the commit of which the cache holds files under a revision."""
    folder = _cache_of(hub_id)
    commit = _read(folder / "refs" / (revision or constants.DEFAULT_REVISION)) or revision
    # Not by `Path.is_dir`, to which a name that is too long is an error.
    return commit if commit and os.path.isdir(folder / "snapshots" / commit) else None


def _cache_of(hub_id: str) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=hub_id, repo_type="model"))


def _read(place: Path) -> str | None:
    try:
        return place.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _check(path: str) -> None:
    """Take a file that was just fetched out of the cache if it is not what the Hub holds.

    huggingface_hub looks at its size alone, and every later run would have taken it for the file.
    """
    if is_right_blob(path) is not False:
        return
    blob = Path(path).resolve()
    Path(path).unlink()
    blob.unlink(missing_ok=True)
    raise DamagedDownloadError(Path(path).name)


def seconds_to_wait(response: Any) -> float | None:
    """Return how long an answer of the Hub asks to wait, in seconds; None where it does not say."""
    headers = getattr(response, "headers", {})
    after = str(headers.get("Retry-After", "")).strip()
    if after.isdigit():
        return float(after)
    # By a draft of the IETF: `"api";r=0;t=55`, of which t is the seconds until the limit is lifted.
    parts = dict(part.strip().partition("=")[::2] for part in str(headers.get("RateLimit", "")).split(";"))
    left, until = parts.get("r", ""), parts.get("t", "")
    return float(until) if left == "0" and until.isdigit() else None


def _may_pass(error: BaseException, *, is_urgent: bool) -> bool:
    if (response := getattr(error, "response", None)) is not None:
        return response.status_code in PASSING
    return isinstance(error, TRANSPORT_ERROR) and not is_urgent


def _in_short(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"it answers {response.status_code} {response.reason_phrase}".rstrip()
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
