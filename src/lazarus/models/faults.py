"""The faults of the libraries below, put as what was wrong and what to do about it."""

from __future__ import annotations

import pickle
import re
import struct
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from json import JSONDecodeError

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from lazarus.blame import Translated, is_out_of_memory, one_line
from lazarus.errors import ModelError, ModelNotFoundError, UnsupportedModelError, WeightsError
from lazarus.messages import CAUSE, option
from lazarus.models.files import FileChangedError, NotAFileError
from lazarus.models.hub_faults import told_of_the_hub


class ConversionError(RuntimeError):
    """transformers could not make a parameter of what is stored for it."""

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> ConversionError:
        """Make the error of the first of transformers' texts, one a parameter: a traceback and a reason."""
        target, text = next(iter(texts.items()))
        return cls(f"{target}: {'. '.join(text.strip().splitlines()[-2:])}")


@dataclass(frozen=True)
class _Known:
    """A fault that has a sentence of its own; it is known by its type, or by a part of its text."""

    signs: tuple[type[BaseException] | str, ...]
    kind: type[ModelError]
    sentence: str
    option: str | None = None
    """the option that it asks for"""

    def fits(self, error: BaseException) -> bool:
        return any(
            sign in one_line(error) if isinstance(sign, str) else isinstance(error, sign)
            for sign in self.signs
        )


# The first that fits is used. Where none does, transformers' own text is passed on, on one line.
_KNOWN = (
    _Known(
        ("trust_remote_code", "execute the configuration file"),
        UnsupportedModelError,
        "this model comes with Python code of its own. Read that code, then allow it with "
        f"{option('trust_remote_code', True)}.",
        "trust_remote_code",
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
        (FileChangedError,),
        WeightsError,
        "{text}, so what was read may be of two states. Run again when nothing writes there.",
    ),
    _Known(
        (NotAFileError,),
        WeightsError,
        "{text}. Put the file itself there.",
    ),
    _Known(
        (FileNotFoundError,),
        WeightsError,
        "a file is missing: {text}. Fetch the model again.",
    ),
    _Known(
        (
            "no file named model.safetensors",
            "cannot be loaded with `safetensors`",
            "Unable to find a safetensors",
        ),
        WeightsError,
        "no safetensors weights there. Pickled weights (.bin) can run code when they are read and are "
        "refused: load the model where you trust it, and write it again with save_pretrained.",
    ),
)

_QUOTED = re.compile(r'(?:string|variant|field) (?:"(?:[^"\\\\]|\\\\.)*"|`[^`]*`)')
"""what serde, the reader of JSON of the package tokenizers, quotes of a file"""

_OF_FILES = (
    ConversionError,
    OSError,
    ModuleNotFoundError,
    UnicodeDecodeError,
    JSONDecodeError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
    struct.error,
)
"""What files, the network and packages raise, also where our own code opens them."""


def translated(name: str) -> Translated:
    """Turn what other libraries raise while `name` is loaded into a ModelError that says what to do.

    What our own code raises there passes, unless files, the network or a package are at fault.

    Raises:
        ModelNotFoundError: gated, unknown, offline, or an unknown revision.
        WeightsError: pickled, truncated or missing weights.
        UnsupportedModelError: custom code, or a package that the model needs.
        ModelError: whatever else transformers says about it.
    """
    return Translated(f"loading {name}", partial(_told, name), _OF_FILES)


def _told(name: str, error: BaseException) -> ModelError:
    if (found := _conversion_error(error)) is not None:
        # transformers collects whatever a conversion raises, and a lack of memory is no fault of the files.
        if is_out_of_memory(found):
            found.add_note(f"loading {name}")
            raise found from error
        return _of_the_files(name, found)
    if told := told_of_the_hub(name, list(_causes(error))):
        return told
    return _of_the_files(name, error)


def _conversion_error(error: BaseException) -> ConversionError | None:
    """Return what transformers says in a report of its own, which the exception only names."""
    if "during automatic conversion of the weights" not in str(error):
        return None
    # The exception only points to a report in the log. A local variable of the frame that raised it has it.
    for frame, _ in traceback.walk_tb(error.__traceback__):
        texts = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if texts:
            return ConversionError.of(texts)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    fault: BaseException | None = error
    while fault is not None:
        yield fault
        # transformers raises an OSError of its own for most of the Hub's errors, and has these as the cause.
        fault = fault.__cause__ or fault.__context__


def _of_the_files(name: str, error: BaseException) -> ModelError:
    text = one_line(error)
    if isinstance(error, JSONDecodeError):  # the file may be a link to a secret: nothing of it is quoted
        text = f"{error.msg.rstrip(': ')} (line {error.lineno}, column {error.colno})"
    # The tokenizers library, in Rust, raises bare Exceptions.
    if type(error) is Exception:
        text = _QUOTED.sub("a text", text)
        return ModelError(
            f"{name}: tokenizer.json cannot be read: {text}. It is damaged, or newer than the package "
            "tokenizers here: fetch it again, or upgrade that package."
        )
    for known in _KNOWN:
        if known.fits(error):
            told = known.sentence.format(text=text, first_sentence=text.partition(". ")[0])
            return known.kind(f"{name}: {told}", option=known.option)
    return ModelError(f"{name}: transformers cannot load it: {text}. {option(CAUSE)} shows where it failed.")
