"""Folders that hold a model in another form, or several models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bad_input.kind import BadInput, Prepare, compare, damaged
from factories import save_model, tiny_llama, tiny_tokenizer

WEIGHTS = "model.safetensors"


def _instead(*names: str) -> Callable[[Path], None]:
    """A model whose weights are replaced by files of these names."""

    def damage(model: Path) -> None:
        (model / WEIGHTS).unlink()
        for name in names:
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).write_bytes(b"0")

    return damage


def _ungathered(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    empty = {name: torch.empty(0) if "mlp" in name else tensor for name, tensor in tensors.items()}
    save_file(empty, model / WEIGHTS, metadata={"format": "pt"})


def _holding_models(*names: str) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        for name in names:
            save_model(folder / "run" / name, tiny_llama(), tiny_tokenizer())
        return compare(f="run")

    return prepare


def _cached(folder: Path) -> list[str]:
    place = folder / "models--org--tuned"
    (place / "refs").mkdir(parents=True)
    save_model(place / "snapshots" / ("0" * 40), tiny_llama(), tiny_tokenizer())
    return compare(f="models--org--tuned")


KINDS = (
    BadInput(
        "FSDP",
        "a folder with the shards of FSDP (`pytorch_model_fsdp_0/__0_0.distcp`)",
        damaged(_instead("pytorch_model_fsdp_0/__0_0.distcp")),
        ("damaged", "shards of FSDP", "accelerate merge-weights damaged/pytorch_model_fsdp_0"),
    ),
    BadInput(
        "DeepSpeed",
        "a folder with the shards of DeepSpeed (`global_step500`)",
        damaged(_instead("global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt")),
        ("damaged", "shards of DeepSpeed", "zero_to_fp32.py damaged"),
    ),
    BadInput(
        "ZeRO-3",
        "a model that was saved under ZeRO-3 without gathering its weights",
        damaged(_ungathered),
        ("damaged: 12 tensors hold no elements", "model.layers.0.mlp", "ZeRO-3", "zero_to_fp32.py"),
    ),
    BadInput(
        "Megatron",
        "a checkpoint of Megatron (`iter_0000500/mp_rank_00`)",
        damaged(_instead("iter_0000500/mp_rank_00/model_optim_rng.pt")),
        ("damaged", "Megatron", "converter"),
    ),
    BadInput(
        "Meta",
        "weights in Meta's layout (`consolidated.00.pth`)",
        damaged(_instead("consolidated.00.pth", "params.json")),
        ("damaged", "Meta's own layout", "convert_llama_weights_to_hf"),
    ),
    BadInput(
        "ONNX",
        "a model that was exported to ONNX",
        damaged(_instead("onnx/model.onnx")),
        ("damaged", "ONNX", "Name the model that it was exported from"),
    ),
    BadInput(
        "pickled otherwise",
        "a folder with a pickle of another name (`model.pth`)",
        damaged(_instead("model.pth", "training_args.bin")),
        ("damaged", "pickled file (model.pth)", "save_pretrained"),
    ),
    BadInput(
        "state alone",
        "a trainer's checkpoint whose weights were deleted (`optimizer.pt`)",
        damaged(_instead("optimizer.pt", "training_args.bin")),
        ("damaged", "no weights there", "Fetch the model again"),
    ),
    BadInput(
        "trainer's output",
        "a trainer's output folder, with its checkpoints in it",
        _holding_models("checkpoint-500", "checkpoint-1000"),
        ("run: no config.json there", "output folder of a trainer", "such as run/checkpoint-1000"),
    ),
    BadInput(
        "folder of models",
        "a folder of folders with models in them",
        _holding_models("alpha", "beta"),
        ("run: no config.json there", "folder of folders with models", "alpha, beta"),
    ),
    BadInput(
        "cache folder",
        "a folder of the Hub's cache (`models--org--name`)",
        _cached,
        ("models--org--tuned", "Hub's cache", "org/tuned", "snapshots"),
    ),
)
