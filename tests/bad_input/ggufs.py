"""GGUF files that are no model, or not a whole one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bad_input.kind import BadInput, Prepare, compare
from factories import tiny_llama
from ggufs import add, write_gguf


def _other(architecture: str, keys: dict[str, Any], tensors: Iterable[str]) -> Prepare:
    """A file of another kind than a model."""

    def prepare(folder: Path) -> list[str]:
        writer = gguf.GGUFWriter(folder / "other.gguf", architecture)
        for key, value in keys.items():
            add(writer, key, value)
        for name in tensors:
            writer.add_tensor(name, np.zeros((4, 4), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return compare(f="other.gguf")

    return prepare


def _model(damage: Callable[[Path], str] = lambda _: "model.gguf", **how: Any) -> Prepare:
    """A model's file, or its parts, and what was done to it; `damage` returns the name to give."""

    def prepare(folder: Path) -> list[str]:
        write_gguf(folder / "model.gguf", "llama", tiny_llama(), **how)
        return compare(f=damage(folder))

    return prepare


def _lose_a_part(folder: Path) -> str:
    next(folder.glob("model-00003-of-*.gguf")).unlink()
    return "model-00001-of-00004.gguf"


def _rename_a_part(folder: Path) -> str:
    next(folder.glob("model-00002-of-*.gguf")).rename(folder / "model.gguf")
    return "model.gguf"


def _big_endian(folder: Path) -> str:
    path = folder / "model.gguf"
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + raw[4:8][::-1] + raw[8:])
    return path.name


def _two(folder: Path) -> str:
    (folder / "quants").mkdir()
    for name in ("model-Q4_0.gguf", "model-Q8_0.gguf"):
        (folder / "quants" / name).write_bytes((folder / "model.gguf").read_bytes())
    return "quants"


KINDS = (
    BadInput(
        "gguf of a LoRA",
        "a `.gguf` file that is a LoRA",
        _other("llama", {"general.type": "adapter"}, ["blk.0.attn_q.weight.lora_a"]),
        ("other.gguf", "a LoRA adapter, not a model", "general.type", "Name the PEFT adapter"),
    ),
    BadInput(
        "gguf of a projector",
        "a `.gguf` file that is the projector of a multimodal model (`mmproj`)",
        _other("clip", {"general.type": "mmproj"}, ["mm.0.weight"]),
        ("other.gguf", "mmproj", "not a language model", "Name the GGUF file of the language model"),
    ),
    BadInput(
        "gguf of an importance matrix",
        "a `.gguf` file that is an importance matrix (`imatrix`)",
        _other("llama", {"general.type": "imatrix"}, ["blk.0.attn_q.weight.in_sum2"]),
        ("other.gguf", "imatrix", "not a model", "Name the model's own GGUF file"),
    ),
    BadInput(
        "gguf without tensors",
        "a `.gguf` file that holds a vocabulary and no tensor",
        _other("llama", {"general.type": "model"}, []),
        ("other.gguf", "holds no tensor", "Name the model's own GGUF file"),
    ),
    BadInput(
        "gguf of a part missing",
        "a part of a split `.gguf` model of which another part is missing",
        _model(_lose_a_part, split=12),
        ("4 parts", "missing: model-00003-of-00004.gguf", "into the same folder"),
    ),
    BadInput(
        "gguf of a part renamed",
        "a part of a split `.gguf` model under another name",
        _model(_rename_a_part, split=12),
        ("model.gguf", "part 2 of 4", "split.count", "llama-gguf-split --merge"),
    ),
    BadInput(
        "gguf without a size",
        "a `.gguf` file that does not say how many blocks it has",
        _model(without=["block_count"]),
        ("model.gguf", "no llama.block_count", "convert the model again"),
    ),
    BadInput(
        "gguf of other sizes",
        "a `.gguf` file that declares more blocks than it holds",
        _model(keys={"block_count": 32}),
        ("model.gguf", "llama.block_count is 32", "4 blocks", "fetch or convert it again"),
    ),
    BadInput(
        "gguf big-endian",
        "a big-endian `.gguf` file",
        _model(_big_endian),
        ("model.gguf", "big-endian", "gguf-convert-endian"),
    ),
    BadInput(
        "gguf files to choose from",
        "`-f quants`, a folder with two `.gguf` models and no other weights",
        _model(_two),
        ("quants", "2 GGUF models", "Name one of them", "quants/model-Q8_0.gguf"),
    ),
)
