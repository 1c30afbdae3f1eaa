"""The faults of the libraries below, told as what was wrong and what to do about it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from lazarus.errors import (
    LazarusError,
    ModelError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightsError,
)

_LOADING_FAULTS = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    KeyError,
    AttributeError,
    TypeError,
    AssertionError,
    SafetensorError,
    pickle.UnpicklingError,
)


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Turn what loading `name` raises into a ModelError that says what to do.

    Raises:
        ModelNotFoundError: gated, unknown, offline, or an unknown revision.
        WeightsError: pickled, truncated or missing weights.
        UnsupportedModelError: custom code, or a package that the model needs.
        ModelError: whatever else transformers says about it.
    """
    try:
        yield
    except LazarusError:
        raise
    except _LOADING_FAULTS as error:
        raise _told(name, error) from error


def _told(name: str, error: BaseException) -> ModelError:
    for fault in _causes(error):
        if told := _of_the_hub(name, fault):
            return told
    return _of_the_files(name, error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    fault: BaseException | None = error
    while fault is not None:
        yield fault
        fault = fault.__cause__ or fault.__context__


def _of_the_hub(name: str, fault: BaseException) -> ModelError | None:
    """The Hub's own faults; a gated repository is also a RepositoryNotFoundError, so it is first."""
    if isinstance(fault, GatedRepoError):
        return ModelNotFoundError(
            f"{name}: this repository is gated. Ask for access on its page on the Hub, then log in "
            "(`hf auth login`, or HF_TOKEN)."
        )
    if isinstance(fault, RepositoryNotFoundError):
        return ModelNotFoundError(
            f"{name}: no such folder here, and no such model on the Hub. Check the name; a private "
            "one needs a login (`hf auth login`, or HF_TOKEN)."
        )
    if isinstance(fault, RevisionNotFoundError):
        return ModelNotFoundError(
            f"{name}: the model has no such revision. Name a branch, a tag or a commit after the @."
        )
    if isinstance(fault, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
        return ModelNotFoundError(
            f"{name}: no such folder here, not in the cache, and the Hub cannot be reached. Check "
            "the name, the connection and HF_HUB_OFFLINE, or download the model first."
        )
    if isinstance(fault, HFValidationError):
        return ModelNotFoundError(f"{name}: no such folder or file, and not a Hub id. Check the path.")
    return None


def _of_the_files(name: str, error: BaseException) -> ModelError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text or "execute the configuration file" in text:
        return UnsupportedModelError(
            f"{name}: this model comes with Python code of its own. Read that code, then allow it "
            "with --trust-remote-code."
        )
    if isinstance(error, ImportError):
        return UnsupportedModelError(f"{name}: a package is missing: {text} Install it and run again.")
    if isinstance(error, SafetensorError):
        return WeightsError(
            f"{name}: the weights cannot be read: {text}. A file is damaged or cut short: fetch it again."
        )
    if isinstance(error, FileNotFoundError):
        return WeightsError(f"{name}: a file is missing: {text}. Fetch the model again.")
    if "no file named model.safetensors" in text or "Unable to find a safetensors" in text:
        return WeightsError(
            f"{name}: no safetensors weights there. Pickled weights (.bin) can run code when they "
            "are read and are refused: save the model again with safe_serialization."
        )
    if "size mismatch" in text or ("mismatch" in text and "shape" in text):
        return WeightsError(f"{name}: the weights do not have the shapes of config.json: {text}")
    return ModelError(f"{name}: transformers cannot load it: {text}")
