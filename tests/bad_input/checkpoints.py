"""Weights that are missing, damaged, or not those of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from bad_input.kind import BadInput, Prepare, compare, damaged, holding, overwrite
from factories import save_model, tiny_llama, tiny_tokenizer

WEIGHTS = "model.safetensors"
TENSOR = "model.layers.1.mlp.up_proj.weight"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4096\n"

Tensors = dict[str, torch.Tensor]


def _cut_short(model: Path) -> None:
    raw = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def _flip_a_bit(model: Path) -> None:
    raw = bytearray((model / WEIGHTS).read_bytes())
    raw[8] ^= 1  # the brace with which the header begins
    (model / WEIGHTS).write_bytes(raw)


def _pickle(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


def _changed(change: Callable[[Tensors], object]) -> Prepare:
    """A model whose tensors were changed and saved again."""

    def damage(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return damaged(damage)


def _all_nan(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.fill_(float("nan"))


def _sharded(damage: Callable[[Path], None]) -> Prepare:
    """A model in several files."""

    def prepare(folder: Path) -> list[str]:
        save_model(folder / "sharded", tiny_llama(), tiny_tokenizer(), max_shard_size="60KB")
        damage(folder / "sharded")
        return compare(f="sharded")

    return prepare


def _lose_a_shard(model: Path) -> None:
    next(model.glob("model-00002-of-*.safetensors")).unlink()


def _another_set(name: str) -> Callable[[Path], None]:
    """A damage: other weights beside those of the model, in a file of that name."""

    def damage(model: Path) -> None:
        tensors = {key: tensor + 1 for key, tensor in load_file(model / WEIGHTS).items()}
        save_file(tensors, model / name, metadata={"format": "pt"})

    return damage


def _without_index(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()


def _shards_of_two(model: Path) -> None:
    first, second = sorted(model.glob("model-*.safetensors"))[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {key: tensor + 1}, second, metadata={"format": "pt"})


def _renamed(model: Path) -> None:
    (model / WEIGHTS).rename(model / "weights.safetensors")


def _gguf(architecture: str, n_bytes: int | None = None) -> Prepare:
    """A GGUF file with one tensor, the first `n_bytes` of it."""

    def prepare(folder: Path) -> list[str]:
        path = folder / "model.gguf"
        writer = GGUFWriter(path, architecture)
        writer.add_tensor("token_embd.weight", torch.zeros(300, 32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        path.write_bytes(path.read_bytes()[:n_bytes])
        return compare(f="model.gguf")

    return prepare


KINDS = (
    BadInput(
        "weights missing",
        "a model folder without weights",
        damaged(lambda model: (model / WEIGHTS).unlink()),
        ("damaged", "no weights there", "Fetch the model again"),
    ),
    BadInput(
        "weights pickled",
        "a model folder with pickled weights alone (`pytorch_model.bin`)",
        damaged(_pickle),
        ("damaged", "no safetensors weights", "Pickled", "save_pretrained"),
    ),
    BadInput(
        "weights cut short",
        "a `model.safetensors` whose download broke off",
        damaged(_cut_short),
        ("damaged", "weights cannot be read", "damaged or cut short", "fetch it again"),
    ),
    BadInput(
        "weights header damaged",
        "a `model.safetensors` with one bit of its header changed",
        damaged(_flip_a_bit),
        ("damaged", "weights cannot be read", "damaged or cut short", "fetch it again"),
    ),
    BadInput(
        "weights a pointer",
        "a `model.safetensors` that is a Git LFS pointer",
        damaged(overwrite(WEIGHTS, LFS_POINTER)),
        ("damaged", "weights cannot be read", "damaged or cut short", "fetch it again"),
    ),
    BadInput(
        "shard missing",
        "a sharded checkpoint without one of its files",
        _sharded(_lose_a_shard),
        ("sharded/model-00002-of-", "a file is missing", "Fetch the model again"),
    ),
    BadInput(
        "shards without their index",
        "a sharded checkpoint without `model.safetensors.index.json`",
        _sharded(_without_index),
        ("sharded", "shards of weights", "without their index", "Fetch the index"),
    ),
    BadInput(
        "shards of two checkpoints",
        "a sharded checkpoint of which two files hold one tensor with two values",
        _sharded(_shards_of_two),
        ("sharded", "two of its files with two values", "model-00001-of-", "model-00002-of-", "save"),
    ),
    BadInput(
        "two sets of weights",
        "a folder with two files of weights of one model, which differ",
        damaged(_another_set("best.safetensors")),
        ("two sets of weights", "model.safetensors and best.safetensors", "damaged/best.safetensors"),
    ),
    BadInput(
        "weights under another name",
        "a model folder with `weights.safetensors` alone",
        damaged(_renamed),
        ("damaged", "no model.safetensors", "damaged/weights.safetensors"),
    ),
    BadInput(
        "shard index empty",
        "a sharded checkpoint whose index names no tensor",
        _sharded(overwrite("model.safetensors.index.json", '{"metadata": {}, "weight_map": {}}')),
        ("sharded", "names no file of weights", "Fetch it again"),
    ),
    BadInput(
        "shard index broken",
        "a sharded checkpoint whose index is cut short",
        _sharded(overwrite("model.safetensors.index.json", '{"metadata": {')),
        ("sharded/model.safetensors.index.json", "no JSON", "line 1, column 15", "Fetch it again"),
    ),
    BadInput(
        "tensor missing",
        "a checkpoint without one of its tensors",
        _changed(lambda tensors: tensors.pop(TENSOR)),
        ("damaged", "missing tensors of LlamaForCausalLM: 1", TENSOR, "fetch it again"),
    ),
    BadInput(
        "tensor of another shape",
        "a tensor whose shape is not that of `config.json`",
        _changed(lambda tensors: tensors.update({TENSOR: torch.zeros(63, 32)})),
        ("damaged", TENSOR, "[63, 32]", "config.json asks for [64, 32]", "fetch both again"),
    ),
    BadInput(
        "weights NaN",
        "weights that are NaN everywhere",
        _changed(_all_nan),
        ("No layer", "finite", "damaged", "NaN", "first model.embed_tokens.weight"),
    ),
    BadInput(
        "gguf not one",
        "a `.gguf` file that holds a web page",
        holding("model.gguf", "<html>Not found</html>", f="model.gguf"),
        ("model.gguf", "not a GGUF file", "fetch it again"),
    ),
    BadInput(
        "gguf header cut short",
        "a `.gguf` file that ends in its header",
        _gguf("llama", n_bytes=64),
        ("model.gguf", "weights cannot be read", "damaged or cut short", "fetch it again"),
    ),
    BadInput(
        "gguf tensors cut short",
        "a `.gguf` file that ends in its tensors",
        _gguf("llama", n_bytes=20_000),
        ("model.gguf", "weights cannot be read", "damaged or cut short", "fetch it again"),
    ),
    BadInput(
        "gguf of an unknown architecture",
        "a `.gguf` file of an architecture that transformers does not know",
        _gguf("llama9"),
        ("model.gguf", "llama9", "not supported"),
    ),
)
