"""Folders that hold a model in a form that is not read, and the tool that makes a checkpoint of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lazarus.errors import ModelNotFoundError, WeightsError
from lazarus.models.hub import Repository
from lazarus.models.reference import Source

_READ = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "*.gguf",
)
"""What the loaders look for themselves; pickled weights they refuse in words of their own."""

_FORMATS = (
    (
        ("*.distcp", "*/*.distcp"),
        "shards of FSDP. Join them: `accelerate merge-weights {place} OUTPUT`",
    ),
    (
        ("global_step*", "zero_to_fp32.py", "zero_pp_rank_*", "*/zero_pp_rank_*"),
        "shards of DeepSpeed. Join them with the script that DeepSpeed has put beside them: "
        "`python zero_to_fp32.py {folder} OUTPUT --safe_serialization`",
    ),
    (
        ("mp_rank_*", "iter_*/mp_rank_*", "latest_checkpointed_iteration.txt"),
        "a checkpoint of Megatron. Convert it with Megatron's own converter to Hugging Face",
    ),
    (
        ("consolidated*.pth", "consolidated*.pt"),
        "weights in Meta's own layout. Convert them with transformers' script "
        "(`python -m transformers.models.llama.convert_llama_weights_to_hf`)",
    ),
    (
        ("tf_model*.h5", "*.ckpt.index"),
        "weights of TensorFlow. Load them with from_tf=True in transformers 4 and save again",
    ),
    (
        ("flax_model*.msgpack",),
        "weights of Flax. Load them with from_flax=True in transformers 4 and save again",
    ),
    (("*.onnx", "onnx/*.onnx"), "a model exported to ONNX. Name the model that it was exported from"),
    (("*.mlpackage", "*.mlmodel"), "a model exported to Core ML. Name the model that it was exported from"),
    (("weights*.npz", "*.npz"), "weights of MLX in NumPy's format. Convert them to safetensors with mlx_lm"),
    (
        ("*.pth", "*.pt", "*.ckpt", "*.bin"),
        "a pickled file ({first}) under a name that transformers does not read. Load it where you trust it, "
        "and write the model again with save_pretrained",
    ),
)
"""Files that are known, by the first pattern that fits, and what to do with them."""


_STATE = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|rng_state.*)\.(pt|pth|bin)")
"""What a trainer saves beside the weights."""


def check_folder(source: Source) -> None:
    """Refuse a folder or a repository that holds no model to read, and say what it holds instead.

    Raises:
        ModelNotFoundError: there is no `config.json`, and what is there can be named.
        WeightsError: there is one, and the weights beside it are in a form that is not read.
    """
    if source.repository is not None and source.file("config.json") is None:
        raise ModelNotFoundError(f"{source.name}: {_without_config_there(source.repository)}")
    if source.kind != "folder":
        return
    folder = Path(source.path) / source.subfolder
    if not (folder / "config.json").is_file():
        told = _without_config(folder)
        if told is not None:
            raise ModelNotFoundError(f"{source.name}: {told}.")
    elif not any(_found(folder, [pattern]) for pattern in _READ):
        for patterns, advice in _FORMATS:
            if found := _found(folder, patterns):
                place = found[0].parent if found[0].is_file() and found[0].parent != folder else found[0]
                told = advice.format(folder=folder, place=place, first=found[0].name)
                raise WeightsError(f"{source.name}: no safetensors weights there; it holds {told}.")
        raise WeightsError(
            f"{source.name}: no weights there: neither model.safetensors nor its parts. Fetch the model "
            "again."
        )


def _without_config_there(repository: Repository) -> str:
    if repository.is_cached:
        return f"config.json is {repository.not_cached()}"
    names = repository.names()
    held = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"the repository holds no config.json, and so no model, but {held or 'nothing'}. Name one that "
        "save_pretrained wrote."
    )


def refuse_empty(name: str, tensors: Sequence[str]) -> None:
    """Refuse a checkpoint whose tensors hold no elements, if there are any.

    Raises:
        WeightsError: it names the first one and its likely cause.
    """
    if tensors:
        raise WeightsError(
            f"{name}: {len(tensors)} tensors hold no elements, first {tensors[0]}. DeepSpeed's ZeRO-3 did "
            "not gather them before the model was saved: join its shards with zero_to_fp32.py, or save with "
            "stage3_gather_16bit_weights_on_model_save."
        )


def _found(folder: Path, patterns: Sequence[str]) -> list[Path]:
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path for path in found if not _STATE.fullmatch(path.name)]


def _without_config(folder: Path) -> str | None:
    """Return what a folder without a `config.json` is, and what to name instead.

    None where it is not known.
    """
    if (folder / "snapshots").is_dir() and (folder / "refs").is_dir():
        hub_id = folder.name.removeprefix("models--").replace("--", "/")
        return f"a folder of the Hub's cache. Name the model, {hub_id}, or a folder in {folder / 'snapshots'}"
    if (folder / "recording.json").is_file():
        return (
            "a recording: it holds hidden states and no weights. Name the model here; activation-diff and "
            "compare take a recording in place of one of the two"
        )
    models = sorted(path.parent for path in folder.glob("*/config.json"))
    adapters = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    inside = sorted({*models, *adapters}, key=_natural)
    if not inside:
        return None
    names = ", ".join(path.name for path in inside[-5:])
    more = f" and {len(inside) - 5} before them" if len(inside) > 5 else ""
    steps = all(path.name.startswith("checkpoint-") for path in inside)
    kind = "the output folder of a trainer" if steps else "a folder of folders with models in them"
    return f"no config.json there: it is {kind}. Name one of them, such as {inside[-1]}: {names}{more}"


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
