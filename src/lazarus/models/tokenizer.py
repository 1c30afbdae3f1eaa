"""The tokenizer that belongs to a model, if it brings one."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from lazarus.models.faults import translated
from lazarus.models.load import LoadedModel
from lazarus.models.reference import Source

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def load_tokenizer(model: LoadedModel, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer beside the adapter or the weights; None where there are no files of one.

    Raises:
        ModelError: the files are there and cannot be read.
    """
    for source in model.tokenizer_sources:
        if source.gguf_file or any(source.file(name) for name in _FILES):
            return _load(source, trust_remote_code)
    return None


def _load(source: Source, trust_remote_code: bool) -> Any:
    where: dict[str, Any] = {"revision": source.revision, "trust_remote_code": trust_remote_code}
    if source.gguf_file:
        where["gguf_file"] = source.gguf_file
    if source.subfolder:
        where["subfolder"] = source.subfolder
    with translated(f"{source.name} (tokenizer)"):
        return AutoTokenizer.from_pretrained(source.path, **where)
