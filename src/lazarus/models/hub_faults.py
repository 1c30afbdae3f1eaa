"""What goes wrong between here and the Hub, put as what was wrong and what to do about it."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token, is_offline_mode
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lazarus.blame import one_line
from lazarus.errors import ModelError, ModelNotFoundError
from lazarus.models.hub import (
    PASSING,
    TRANSPORT_ERROR,
    DamagedDownloadError,
    FetchError,
    NoHubError,
    NoTokenError,
    seconds_to_wait,
)

_LOGIN = "`hf auth login`, or HF_TOKEN"
_USUAL = "https://huggingface.co"
_SHORT_READ = re.compile(r"file should be of size (\d+) but has size (\d+)")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
_LATER = "Run again later: what was fetched whole is kept."


def told_of_the_hub(name: str, faults: Sequence[BaseException]) -> ModelError | None:
    """Return what to say of an error and what it came of, the error first; None if it is not the Hub's."""
    file = next((fault.file for fault in faults if isinstance(fault, FetchError)), None)
    answer = next((fault for fault in faults if isinstance(fault, HfHubHTTPError)), None)
    told = None
    if answer is not None:
        told = _of_the_repository(answer) or _of_an_answer(answer, file)
    told = told or next(filter(None, (_of_a_fault(fault, file) for fault in faults)), None)
    if told is not None:
        return ModelNotFoundError(f"{name}: {told}")
    told = next(filter(None, (_of_the_disk(fault, file) for fault in faults)), None)
    return None if told is None else ModelError(f"{name}: {told}")


def _of_the_repository(error: HfHubHTTPError) -> str | None:
    """Return the sentence on a repository that the Hub does not give."""
    status = error.response.status_code
    # A gated repository is also one that is not found, so it comes first.
    if isinstance(error, GatedRepoError):
        return _gated(error)
    if isinstance(error, RevisionNotFoundError):
        return "the model has no such revision. Name a branch, a tag or a commit after the @."
    if isinstance(error, DisabledRepoError):
        return "the Hub has closed this repository. Its page may say why."
    if status == 401 and "Invalid credentials" in str(error.response.headers.get("X-Error-Message")):
        return f"{_the_hub()} does not take your token. Log in again ({_LOGIN}), or out (`hf auth logout`)."
    # Over plain HTTP, as from a mirror, huggingface_hub makes no RepositoryNotFoundError of a 401.
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        private = f"a private one needs a login ({_LOGIN})"
        if get_token() is not None:
            private = "a private one needs a token of an account that may see it"
        return f"no such folder here, and no such model on {_the_hub()}. Check the name; {private}."
    return None


def _of_an_answer(error: HfHubHTTPError, file: str | None) -> str:
    """Return the sentence on a request that was refused, or that failed on the Hub's side."""
    status = error.response.status_code
    where = _answers(error) if file is None else f"{file} cannot be fetched: {_answers(error)}"
    if status == 429:
        return _limited(error, where)
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{where}, and lists the file. Run again later, or name another revision."
    if status in PASSING or status >= 500:
        return f"{where}. {_LATER}"
    return f"{where}. Your token may lack the right to it, or a firewall may stand between."


def _gated(error: GatedRepoError) -> str:
    page = str(error.response.request.url).partition("/resolve/")[0]
    if error.response.status_code == 401:
        return f"this repository is gated. Ask for access on its page, {page}, then log in ({_LOGIN})."
    return (
        "this repository is gated, and the account of your token has no access. Ask for it on its page, "
        f"{page}; a fine-grained token must also allow gated repositories."
    )


def _limited(error: HfHubHTTPError, where: str) -> str:
    wait = seconds_to_wait(error.response)
    when = "a few minutes" if wait is None else f"{wait:.0f} seconds"
    more = "" if get_token() is not None else f" With a login ({_LOGIN}) more requests are allowed."
    return f"{where}: it was asked too often from here. Wait {when}, then run again.{more}"


def _of_a_fault(fault: BaseException, file: str | None) -> str | None:
    """Return the sentence on a fault that came before any answer, or of no answer."""
    if isinstance(fault, HFValidationError):
        return "no such folder or file, and not a Hub id. Check the path."
    if isinstance(fault, NoTokenError):
        return f"your token holds a character that no token has. Log in again ({_LOGIN})."
    if isinstance(fault, NoHubError | FileMetadataError):
        return (
            f"what answers at {constants.ENDPOINT} is not a Hub. Check HF_ENDPOINT; a proxy, or the login "
            "page of a network, may stand between."
        )
    if isinstance(fault, DamagedDownloadError):
        return (
            f"{file} came damaged: its bytes are not those of which the Hub gave the digest. It was not "
            "kept: run again to have it fetched."
        )
    if (short := _SHORT_READ.search(str(fault))) is not None:
        return f"{file} came with {short[2]} of its {short[1]} bytes. It was not kept: run again."
    if isinstance(fault, OfflineModeIsEnabled | LocalEntryNotFoundError) and is_offline_mode():
        return (
            "no such folder or file here, not in the cache, and HF_HUB_OFFLINE keeps it from being fetched. "
            "Check the name, or unset HF_HUB_OFFLINE."
        )
    if isinstance(fault, TRANSPORT_ERROR | ConnectionError):
        return _unreachable(one_line(fault) or "it does not answer", file)
    return None


def _of_the_disk(fault: BaseException, file: str | None) -> str | None:
    """Return the sentence on a disk that takes nothing more, or on a cache that may not be written."""
    if not isinstance(fault, OSError):
        return None
    if fault.errno in _NO_ROOM:
        what = f"no room on the disk for {file or 'it'}: {fault.strerror}"
        return f"{what}. Make room, or set HF_HOME to a larger disk."
    if fault.errno in _NO_RIGHT and file is not None:
        return (
            f"{file} cannot be fetched: the cache cannot be written: {one_line(fault)}. Allow it, or set "
            "HF_HOME to a folder that can be written."
        )
    return None


def _unreachable(why: str, file: str | None) -> str:
    if file is not None:
        return f"{file} cannot be fetched from {_the_hub()}: {why}. Check the connection. {_LATER}"
    return (
        f"no such folder or file here, not in the cache, and {_the_hub()} cannot be reached: {why}. Check "
        "the name, the connection, the proxy and HF_ENDPOINT."
    )


def _the_hub() -> str:
    """Return what the user knows the Hub as: with its address, where it is not the usual one."""
    return "the Hub" if constants.ENDPOINT == _USUAL else f"the Hub at {constants.ENDPOINT}"


def _answers(error: HfHubHTTPError) -> str:
    """Return who answered, which for a large file is another host, and what."""
    host = urlsplit(str(error.response.request.url)).netloc
    who = _the_hub() if host == urlsplit(constants.ENDPOINT).netloc else host
    return f"{who} answers {error.response.status_code} {error.response.reason_phrase}".rstrip()
