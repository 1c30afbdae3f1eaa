"""The fingerprint of a run: all that must be the same for the same numbers."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from lazarus.models import LoadedModel
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
    "only_compared",
    "anonymous",
    "trust_remote_code",
    "no_digests",
    "work_dir",
    "chat_template",
    "no_split",
    "truncate",
}
"""Options that change no hidden state, or only through ids, device and dtype, which are compared."""
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
        if source.is_on_hub:
            found[f"commit of {source.name}"] = source.revision
    # By their contents: in an image of a container, files of one size and time may be two.
    return found | {f"{name} of {model.name}": digest for name, digest in model.files.digests().items()}


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
