"""A sentence-transformers model after its transformer: pooling, dense layers, normalisation.

The formulas are those of sentence-transformers (Reimers & Gurevych 2019, arXiv 1908.10084), for a prompt that
runs alone: nothing is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lazarus.errors import ModelError
from lazarus.foreign import UnreadableError, content, decoded
from lazarus.models.reference import Source, read_modules
from lazarus.models.stored import read_headers

_ORDER = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""the modes of pooling in the order in which a model that has several puts them together"""
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_OF_POOLING = {*_FLAGS, "word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt"}
_OF_DENSE = {
    *("in_features", "out_features", "bias", "activation_function", "module_input_name", "module_output_name")
}
_SENTENCE = "sentence_embedding"

Step = Callable[[Tensor], Tensor]


class NotReadError(Exception):
    """A module that cannot be run as sentence-transformers runs it; the message is a clause that says why."""


@dataclass(frozen=True)
class Embedder:
    """The modules of a sentence-transformers model that make an embedding of the states of one prompt."""

    modes: Sequence[str]
    """the modes of pooling"""
    steps: Sequence[Step]
    """what comes after it"""
    most_tokens: int | None
    """the length to which sentence-transformers cuts a prompt"""

    def embed(self, states: Tensor) -> Tensor:
        """Return a prompt's embedding, [width], from its states after the transformer, [time, hidden]."""
        found = torch.cat([_POOLED[mode](states) for mode in self.modes])
        for step in self.steps:
            found = step(found)
        return found


def read_embedder(source: Source | None, dtype: torch.dtype, device: torch.device) -> Embedder | None:
    """Read the modules of a sentence-transformers model; None where a source is none.

    Raises:
        NotReadError: it has a module, or a setting of one, whose work is not known here.
    """
    if source is None or source.gguf_file:
        return None
    root = replace(source, subfolder="")
    if (listed := root.file("modules.json")) is None:
        return None
    try:
        modules = read_modules(listed)
    except ModelError as error:
        raise NotReadError(f"{listed} is no list of modules") from error
    kinds = [kind.rpartition(".")[2] for _, kind in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not all(
        k.startswith("sentence_transformers.") for _, k in modules
    ):
        raise NotReadError(f"its modules are {', '.join(kind for _, kind in modules) or 'none'}")
    steps = [
        _step(kind, replace(root, subfolder=path), dtype, device)
        for kind, (path, _) in zip(kinds[2:], modules[2:], strict=True)
    ]
    settings = root.file("sentence_bert_config.json")
    own = _json(settings) if settings else {}
    if own.get("do_lower_case"):
        raise NotReadError("it makes lower case of its prompts")
    return Embedder(_modes(replace(root, subfolder=modules[1][0])), steps, own.get("max_seq_length"))


def _json(path: str) -> Mapping[str, Any]:
    try:
        found = decoded(content(path))
    except UnreadableError as error:
        raise NotReadError(f"{path} is no JSON") from error
    if not isinstance(found, dict):
        raise NotReadError(f"{path} is no JSON object")
    return found


def _settings(folder: Source, known: set[str]) -> Mapping[str, Any]:
    path = folder.file("config.json")
    settings: Mapping[str, Any] = _json(path) if path else {}
    if unknown := sorted(settings.keys() - known):
        raise NotReadError(f"{folder.subfolder} has the setting {unknown[0]}, which is not known")
    return settings


def _modes(folder: Source) -> list[str]:
    """Return how states are pooled: by their mean too, as in sentence-transformers, unless that is denied."""
    settings = _settings(folder, _OF_POOLING)
    flags = {"pooling_mode_mean_tokens": True, **settings}
    chosen = {mode for flag, mode in _FLAGS.items() if flags.get(flag)}
    if (named := settings.get("pooling_mode")) is not None:
        chosen = {named} if isinstance(named, str) else set(named)
    if not chosen or not chosen <= {*_ORDER}:
        raise NotReadError(f"{folder.subfolder} pools by {', '.join(sorted(map(str, chosen))) or 'nothing'}")
    return [mode for mode in _ORDER if mode in chosen]


def _step(kind: str, folder: Source, dtype: torch.dtype, device: torch.device) -> Step:
    match kind:
        case "Normalize":
            return _normalised
        case "Dense":
            return _dense(folder, dtype, device)
    raise NotReadError(f"{folder.subfolder} is a module of the kind {kind}")


def _normalised(embedding: Tensor) -> Tensor:
    return nn.functional.normalize(embedding, dim=-1)


def _dense(folder: Source, dtype: torch.dtype, device: torch.device) -> Step:
    settings, weights = _settings(folder, _OF_DENSE), folder.file("model.safetensors")
    if weights is None:
        raise NotReadError(f"{folder.subfolder} has no model.safetensors")
    names = {settings.get(name, _SENTENCE) for name in ("module_input_name", "module_output_name")}
    kind = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = getattr(nn, kind.rpartition(".")[2], None)
    if names != {_SENTENCE} or not kind.startswith("torch.nn.modules.") or activation is None:
        raise NotReadError(f"{folder.subfolder} is a dense layer of another kind ({kind})")
    try:
        # Empty, because filling it would draw random numbers that are the caller's.
        with torch.device("meta"):
            linear = nn.Linear(settings["in_features"], settings["out_features"], settings.get("bias", True))
        # Read and not mapped: a mapped file that is cut short kills the process that looks at it.
        stored = {key.removeprefix("linear."): each.read() for key, each in read_headers([weights]).items()}
        linear.load_state_dict(stored, assign=True)
        layers = nn.Sequential(linear, activation()).to(device, dtype).requires_grad_(requires_grad=False)
    except (KeyError, OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise NotReadError(f"the weights or the activation of {folder.subfolder} do not fit") from error
    return layers.eval()


def _weighted_mean(states: Tensor) -> Tensor:
    weights = torch.arange(1, len(states) + 1, device=states.device, dtype=states.dtype)[:, None]
    return (states * weights).sum(0) / weights.sum()


_POOLED: Mapping[str, Step] = {
    "cls": lambda states: states[0],
    "max": lambda states: states.amax(0),
    "mean": lambda states: states.mean(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "weightedmean": _weighted_mean,
    "lasttoken": lambda states: states[-1],
}
