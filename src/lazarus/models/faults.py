"""The faults of the libraries below, told as what was wrong and what to do about it."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from json import JSONDecodeError
from types import TracebackType

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from lazarus.errors import (
    ModelError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightsError,
)


@dataclass(frozen=True)
class _Known:
    """A fault that has a sentence of its own; it is known by its type, or by a part of its text."""

    signs: tuple[type[BaseException] | str, ...]
    kind: type[ModelError]
    sentence: str

    def fits(self, error: BaseException) -> bool:
        return any(
            sign in one_line(error) if isinstance(sign, str) else isinstance(error, sign)
            for sign in self.signs
        )


# The first that fits is told. Elsewhere transformers' own text is passed on, on one line.
_KNOWN = (
    _Known(
        ("trust_remote_code", "execute the configuration file"),
        UnsupportedModelError,
        "this model comes with Python code of its own. Read that code, then allow it with "
        "--trust-remote-code.",
    ),
    _Known(
        (ImportError,),
        UnsupportedModelError,
        "a package is missing: {text}. Install it and run again.",
    ),
    _Known(
        ("Unrecognized model in",),
        ModelNotFoundError,
        "no config.json there that names a `model_type`, so transformers cannot tell what it is. Name "
        "a folder that save_pretrained wrote.",
    ),
    _Known(
        ("does not recognize this architecture",),
        UnsupportedModelError,
        "transformers does not know its architecture: {first_sentence}. Check `model_type` in "
        "config.json; a newer model needs a newer transformers.",
    ),
    _Known(
        (StrictDataclassError,),
        ModelError,
        "its config.json cannot be used: {text}. Mend it, or fetch it again.",
    ),
    _Known(
        ("is not a valid JSON file",),
        ModelError,
        "{text}. It is damaged or cut short: fetch it again.",
    ),
    _Known(
        (JSONDecodeError,),
        ModelError,
        "a file is not JSON: {text}. It is damaged or cut short: fetch it again.",
    ),
    _Known(
        (UnicodeDecodeError,),
        ModelError,
        "a file is not UTF-8: {text}. It is damaged: fetch it again.",
    ),
    _Known(
        ("Couldn't instantiate the backend tokenizer",),
        ModelError,
        "its files make no tokenizer: there is no tokenizer.json that is whole. Copy the tokenizer's "
        "files from the base model; a SentencePiece or tiktoken file needs "
        "`pip install 'lazarus-introspect[sentencepiece]'`.",
    ),
    _Known(
        (SafetensorError, struct.error, "GGUF magic", "cannot reshape array"),
        WeightsError,
        "the weights cannot be read: {text}. A file is damaged or cut short: fetch it again.",
    ),
    _Known(
        (FileNotFoundError,),
        WeightsError,
        "a file is missing: {text}. Fetch the model again.",
    ),
    _Known(
        ("no file named model.safetensors", "Unable to find a safetensors"),
        WeightsError,
        "no safetensors weights there. Pickled weights (.bin) can run code when they are read and are "
        "refused: load the model where you trust it, and write it again with save_pretrained.",
    ),
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
    StrictDataclassError,
    pickle.UnpicklingError,
    struct.error,
)


def translated(name: str) -> AbstractContextManager[None]:
    """Turn what loading `name` raises into a ModelError that says what to do.

    Raises:
        ModelNotFoundError: gated, unknown, offline, or an unknown revision.
        WeightsError: pickled, truncated or missing weights.
        UnsupportedModelError: custom code, or a package that the model needs.
        ModelError: whatever else transformers says about it.
    """
    return _Translation(name)


@dataclass(frozen=True)
class _Translation:
    name: str

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        # No except clause can name what tokenizers, written in Rust, raises: Exception itself.
        if error is not None and (kind is Exception or isinstance(error, _LOADING_FAULTS)):
            raise _told(self.name, error) from error


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
    text = one_line(error)
    if isinstance(error, JSONDecodeError):  # it does not say which file
        text += f" of the one that begins with {error.doc[:30]!r}"
    if type(error) is Exception:
        return ModelError(
            f"{name}: tokenizer.json cannot be read: {text}. It is damaged, or newer than the package "
            "tokenizers here: fetch it again, or upgrade that package."
        )
    for known in _KNOWN:
        if known.fits(error):
            told = known.sentence.format(text=text, first_sentence=text.partition(". ")[0])
            return known.kind(f"{name}: {told}")
    return ModelError(f"{name}: transformers cannot load it: {text}. --debug shows where it failed.")


def one_line(error: BaseException) -> str:
    """What an error says, on one line and without its full stop."""
    return " ".join(str(error).split()).rstrip(".")
