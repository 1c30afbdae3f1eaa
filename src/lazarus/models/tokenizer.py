"""The tokenizer that belongs to a model, if it brings one; or the one that a caller gives."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lazarus.bounds import MOST_VOCABULARY_BYTES
from lazarus.errors import ModelError, UsageError
from lazarus.foreign import read_json
from lazarus.growth import refusal
from lazarus.models.faults import translated
from lazarus.models.loaded import LoadedModel
from lazarus.models.reference import Source, parse_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_FETCH = "It is damaged or cut short: fetch it again."
_JSON_FILES = (
    *(name for name in TOKENIZER_FILES if name.endswith(".json")),
    "added_tokens.json",
    "special_tokens_map.json",
)
_NAMES_A_FILE = re.compile(r"vocab|merges|.*_(file|spm)")
"""settings of tokenizer_config.json whose text transformers takes for the path of a file"""


def load_tokenizer(model: LoadedModel, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer beside the adapter or the weights; None where there are no files of one.

    Raises:
        ModelError: the files are there and cannot be read.
    """
    return first_tokenizer(model.tokenizer_sources, trust_remote_code)


def find_tokenizer(given: Any | None, *, trust_remote_code: bool = False) -> Any | None:
    """Return the tokenizer that a caller gives in place of the models' own: itself, or loaded by its name.

    A name is a folder, a Hub id, or whatever else names a model. Of a processor, it is the tokenizer in it.

    Raises:
        UsageError: it is neither a tokenizer nor a name, or there is no tokenizer under that name.
        ModelError: there is nothing under that name, or its files cannot be read.
    """
    if given is None or isinstance(given, PreTrainedTokenizerBase):
        return given
    if isinstance(given, str | Path) and str(given).strip():
        reference = parse_model(str(given))
        sources = [
            source for source in (*reversed(reference.adapters), reference.model) if source is not None
        ]
        found = first_tokenizer(sources, trust_remote_code)
        if found is None:
            raise UsageError(
                f"tokenizer={str(given)!r}: no files of a tokenizer are there. Name the folder or the Hub id "
                "that holds tokenizer.json."
            )
        return found
    within = getattr(given, "tokenizer", None)
    if isinstance(within, PreTrainedTokenizerBase):
        return within
    raise UsageError(
        f"tokenizer={given!r:.60}: neither a tokenizer of transformers nor the name of one, but of the class "
        f"{type(given).__name__}. Give AutoTokenizer.from_pretrained(...), or a folder or a Hub id."
    )


def first_tokenizer(sources: Iterable[Source], trust_remote_code: bool) -> Any | None:
    """Load the tokenizer of the first of these that has one; None where there are no files of one.

    Raises:
        ModelError: the files are there and cannot be read.
    """
    for source in sources:
        if source.gguf_file or any(source.file(name) for name in TOKENIZER_FILES):
            return _load(source, trust_remote_code)
    return None


def uncached_tokenizer(model: LoadedModel) -> str | None:
    """Return why a model may have a tokenizer although none was found; None where it has none."""
    asked = [source.repository for source in model.tokenizer_sources]
    return next((f"its tokenizer is {each.not_cached()}" for each in asked if each and each.is_cached), None)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of what a tokenizer is, whatever padding and truncation it is set to.

    Of one that is written in Python it is that of its class, its vocabulary and its added tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = json.loads(backend.to_str())
        definition = {k: v for k, v in definition.items() if k not in ("padding", "truncation")}
    else:
        added = sorted((i, str(token)) for i, token in tokenizer.added_tokens_decoder.items())
        definition = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "added": added}
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def _load(source: Source, trust_remote_code: bool) -> Any:
    where = source.where(trust_remote_code=trust_remote_code)
    if source.gguf_file:
        where["gguf_file"] = source.gguf_file
    name = f"{source.name} (tokenizer)"
    _check_growth(source)
    where |= _without_paths(source)
    try:
        with translated(name):
            found = AutoTokenizer.from_pretrained(source.path, **where)
    except ModelError:
        _check_files(source)  # transformers does not say which of the files is at fault
        if source.repository is not None and source.repository.lacks("tokenizer.json"):
            raise ModelError(f"{name}: tokenizer.json is {source.repository.not_cached()}") from None
        raise
    if not isinstance(found, PreTrainedTokenizerBase) or not isinstance(found.model_max_length, int | float):
        raise ModelError(
            f"{name}: tokenizer_config.json names no tokenizer (tokenizer_class), or its model_max_length is "
            "no number. Fetch the file again."
        )
    return found


def _without_paths(source: Source) -> dict[str, None]:
    """Return arguments in the place of the paths in a tokenizer_config.json, which lead to any file.

    What such a path leads to would be read, and each of its lines be a token. With None, transformers reads
    the file in the tokenizer's own folder. Many published files hold a path of their author's machine, so a
    path alone is no reason to refuse one.

    Raises:
        ModelError: the file cannot be read, or has paths in whose place nothing can be given.
    """
    path = None if source.gguf_file else source.file("tokenizer_config.json")
    settings = {} if path is None else read_json(path, ModelError, _FETCH, MOST_VOCABULARY_BYTES)
    if not isinstance(settings, dict):
        return {}
    pieces = settings.get("sp_model_kwargs")
    if settings.get("init_inputs") or (isinstance(pieces, dict) and "model_file" in pieces):
        raise ModelError(
            f"{path}: has init_inputs, or a model_file in sp_model_kwargs, which may lead to any file. "
            "Take them out: the tokenizer's own files are found without them."
        )
    return {
        name: None
        for name, value in settings.items()
        if isinstance(value, str) and _NAMES_A_FILE.fullmatch(name)
    }


def _check_growth(source: Source) -> None:
    """Refuse a tokenizer that makes endless texts of its own tokens, before it does.

    Raises:
        ModelError: it names the part of tokenizer.json.
    """
    path = None if source.gguf_file else source.file("tokenizer.json")
    if path is None:
        return
    definition = read_json(path, ModelError, _FETCH, MOST_VOCABULARY_BYTES)
    if isinstance(definition, dict) and (why := refusal(definition)):
        raise ModelError(f"{path}: {why}")


def _check_files(source: Source) -> None:
    """Refuse a tokenizer of which a file is no JSON.

    Raises:
        ModelError: it names the file, and where in it the fault is.
    """
    for name in _JSON_FILES if not source.gguf_file else ():
        if (path := source.file(name)) is not None:
            read_json(path, ModelError, _FETCH, MOST_VOCABULARY_BYTES)
