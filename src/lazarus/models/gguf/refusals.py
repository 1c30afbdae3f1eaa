"""GGUF files that hold no model, or contradict themselves: refused before anything of their size is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lazarus.errors import UnsupportedModelError, WeightsError
from lazarus.models.gguf.parts import Gguf

_BLOCK = re.compile(r"(?:enc\.)?blk\.(\d{1,9})\.")


@dataclass(frozen=True)
class _Other:
    """A kind of GGUF file that is no model: known by its type or architecture, or by its keys and tensors."""

    names: frozenset[str]
    keys: re.Pattern[str]
    tensors: re.Pattern[str]
    what: str
    remedy: str


_OTHERS = (
    _Other(
        frozenset({"adapter"}),
        re.compile(r"adapter\..*"),
        re.compile(r".*\.lora_[ab]"),
        "a LoRA adapter, not a model",
        "Name the PEFT adapter that it was converted from, a folder with an adapter_config.json: "
        "MODEL+ADAPTER",
    ),
    _Other(
        frozenset({"controlvector"}),
        re.compile(r"controlvector\..*"),
        re.compile(r"direction\.\d+"),
        "a control vector, not a model",
        "Name the model that it steers",
    ),
    _Other(
        frozenset({"mmproj", "projector", "clip"}),
        re.compile(r"clip\..*"),
        re.compile(r"(v|a|mm)\..*"),
        "the vision or audio encoder of a multimodal model with its projector (mmproj), not a language model",
        "Name the GGUF file of the language model that belongs to it",
    ),
    _Other(
        frozenset({"imatrix"}),
        re.compile(r"imatrix\..*"),
        re.compile(r".*\.(in_sum2|counts)"),
        "an importance matrix for quantising (imatrix), not a model",
        "Name the model's own GGUF file",
    ),
    _Other(
        frozenset({"vocab"}),
        re.compile(r"(?!)"),
        re.compile(r"(?!)"),
        "a vocabulary, not a model",
        "Name the model's own GGUF file",
    ),
)


def refuse_other_kinds(file: Gguf) -> None:
    """Refuse a file that holds no language model, by its metadata and its tensors.

    Raises:
        UnsupportedModelError: it is an adapter, a projector, an importance matrix or the like.
        WeightsError: it does not say its architecture.
    """
    kind = str(file.metadata.get("general.type", "model"))
    for other in _OTHERS:
        if kind in other.names:
            raise _refusal(file, other, f"general.type is {kind!r}")
        if file.architecture in other.names:
            raise _refusal(file, other, f"general.architecture is {file.architecture!r}")
        found = [name for name in file.tensors if other.tensors.fullmatch(name)]
        found += [key for key in file.metadata if other.keys.fullmatch(key)]
        # None of these kinds has an embedding; a model may have keys or tensors like theirs besides.
        if found and "token_embd.weight" not in file.tensors:
            raise _refusal(file, other, f"it holds {found[0]}")
    if kind != "model":
        raise UnsupportedModelError(
            f"{file.name}: its general.type is {kind!r}, and a model's is 'model'. Name the model's own "
            "GGUF file."
        )
    if not file.tensors:
        raise UnsupportedModelError(
            f"{file.name}: it holds no tensor: this is a vocabulary or a header alone. Name the model's own "
            "GGUF file."
        )
    if not file.architecture:
        raise WeightsError(
            f"{file.name}: its metadata has no general.architecture. It is damaged, or of another program "
            "than llama.cpp: convert the model again."
        )


def _refusal(file: Gguf, other: _Other, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{file.name}: this is {other.what} ({reason}). {other.remedy}.")


def refuse_unreadable_types(file: Gguf) -> None:
    """Refuse a file with a tensor that cannot be dequantised.

    Raises:
        UnsupportedModelError: the package gguf has no dequantisation for its type.
    """
    for name, tensor in file.tensors.items():
        if not _is_readable(tensor.kind):
            raise UnsupportedModelError(
                f"{file.name}: {name} is stored as {tensor.kind.name}, which the package gguf cannot "
                "dequantise. Use a file of another type, or upgrade gguf."
            )


@cache
def _is_readable(kind: Any) -> bool:
    import gguf

    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        # gguf has no list of the types that it can dequantise, so one block of each is tried.
        gguf.dequantize(np.zeros((1, n_bytes), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def refuse_other_sizes(file: Gguf) -> None:
    """Refuse a file whose metadata declares other sizes than its tensors have.

    Raises:
        WeightsError: the number of blocks, a width or the vocabulary disagree.
    """
    blocks = {int(found[1]) for name in file.tensors if (found := _BLOCK.match(name))}
    n_blocks, depth = len(blocks), file.get("block_count")
    if isinstance(depth, int) and depth != n_blocks:
        _disagree(file, "block_count", depth, f"its tensors are of {n_blocks} blocks")
    for tensor, axis, key in (
        ("token_embd.weight", 1, "embedding_length"),
        ("token_embd.weight", 0, "vocab_size"),
        ("blk.0.ffn_down.weight", 1, "feed_forward_length"),
    ):
        declared, stored = file.get(key), file.tensors.get(tensor)
        if not isinstance(declared, int) or stored is None or len(stored.shape) != 2:
            continue
        if stored.shape[axis] != declared:
            _disagree(
                file, key, declared, f"{tensor} has {stored.shape[axis]} there, of {list(stored.shape)}"
            )


def _disagree(file: Gguf, key: str, declared: int, stored: str) -> None:
    raise WeightsError(
        f"{file.name}: {file.key(key)} is {declared}, and {stored}. Metadata and tensors are not of one "
        "model: fetch or convert it again."
    )
