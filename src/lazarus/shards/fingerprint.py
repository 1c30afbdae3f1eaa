"""The fingerprint of a run: all that must be the same for the same numbers."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from lazarus.models import LoadedModel, Source
from lazarus.models.gguf.parts import read_files
from lazarus.options import Options
from lazarus.tokens import TokenizedPrompt
from lazarus.version import __version__

_WITHOUT_EFFECT = {
    "threshold",
    "device",
    "dtype",
    "readout",
    "fail_above",
    "expect",
    "trust_remote_code",
    "work_dir",
    "chat_template",
    "no_split",
    "truncate",
}
"""Options that change no hidden state, or only through ids, device and dtype, which are compared."""
_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", "*.py")
_OF_EMBEDDERS = ("modules.json", "*/config.json", "*/*.safetensors")
"""files of the modules of a sentence-transformers model, from its root"""
_DIGITS = 16


def fingerprint(
    models: tuple[LoadedModel, LoadedModel],
    prompts: tuple[Sequence[TokenizedPrompt], Sequence[TokenizedPrompt]],
    options: Options,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return names and plain values: of the program, both models, their files, the prompts' ids, the options.

    `settings` are the options whose `auto` was decided: they replace the options' own values.
    """
    found = {
        "lazarus": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    found |= {name: value for name, value in asdict(options).items() if name not in _WITHOUT_EFFECT}
    found |= settings
    found["n_prompts"] = len(prompts[0])
    for side, model, ids in zip(("base", "finetuned"), models, prompts, strict=True):
        found[f"{side} prompts"] = _hash_of_ids(ids)
        found |= {f"{side} {name}": value for name, value in _of_model(model).items()}
    return found


def _of_model(model: LoadedModel) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": model.name,
        "revision": model.revision,
        "architecture": type(model.model).__name__,
        "run_dtype": model.run_dtype,
        "adapter": model.adapter,
    }
    if not model.tokenizer_sources:
        return {**found, "weights": _hash_of_weights(model)}
    for source in model.tokenizer_sources:
        found |= _files_of(source)
    return found


def _files_of(source: Source) -> dict[str, Any]:
    """Return size and time of change of the files of a local model, or the commit of one on the Hub."""
    if source.is_on_hub:
        return {f"commit of {source.name}": source.revision}
    if source.gguf_file:
        paths = [Path(path) for path in read_files(source).paths]
    else:
        root, folder = Path(source.path), Path(source.path, source.subfolder)
        paths = sorted(path for pattern in _PATTERNS for path in folder.glob(pattern))
        if (root / "modules.json").exists():
            paths += sorted(path for pattern in _OF_EMBEDDERS for path in root.glob(pattern))
    # A module has a name like the model's, in a folder of its own.
    stats = {path.relative_to(source.path).as_posix(): path.stat() for path in paths}
    return {
        f"{name} of {source.name}": f"{found.st_size} bytes, changed at {found.st_mtime_ns} ns"
        for name, found in stats.items()
    }


def _hash_of_weights(model: LoadedModel) -> str:
    """Return a hash of a model in memory: its configuration, every tensor's name, dtype, shape and bytes."""
    config = json.dumps(model.model.config.to_dict(), sort_keys=True, default=str)
    found = hashlib.sha256(config.encode())
    for name, tensor in model.model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, because NumPy has no bfloat16.
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:_DIGITS]


def _hash_of_ids(prompts: Sequence[TokenizedPrompt]) -> str:
    found = hashlib.sha256()
    for prompt in prompts:
        edges = [edge for tokens in prompt.response for edge in (tokens.start, tokens.stop)]
        found.update(array("q", [len(prompt.ids), *prompt.ids, len(edges), *edges]).tobytes())
    return found.hexdigest()[:_DIGITS]
