"""The places of an adapter's tensors on a model of its class, or of another over the same blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus.errors import AdapterError, BlocksNotFoundError
from lazarus.models.anatomy import dissect
from lazarus.models.layout import hollow, is_hollow
from lazarus.models.stored import StoredTensor

OUTER = "base_model.model."
"""what PEFT puts before every name"""
_ORIGINAL = ".original_module."
"""in the name of a tensor that no forward pass reads: PEFT saves the table that it has put another over"""
_NUMBER = re.compile(r"[^.]+\.\d+(?=\.|$)")

Shaped = Tensor | StoredTensor
Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Fit:
    """An adapter's tensors by their names on one model."""

    moved: Mapping[str, str]
    """the names on the model, by the stored names, of all that are put on"""
    left_out: tuple[str, ...] = ()
    """the stored names of what the model has no part for, such as a score head"""
    paths: Mapping[str, str] | None = None
    """the modules that it acts on, by their paths in training, where some are elsewhere in this model"""
    n_rows: int | None = None
    """the rows of the vocabulary in training, where the model has another number"""


@dataclass(frozen=True)
class _Move:
    """A change of the prefix of paths."""

    old: str
    new: str

    def __call__(self, path: str) -> str:
        return self.new + path[len(self.old) :] if path.startswith(self.old) else path


def find_fit(name: str, model: PreTrainedModel, stored: Mapping[str, Shaped]) -> Fit:
    """Find the places of an adapter's tensors on a model, by the paths of the modules that they act on.

    A class over the same blocks has these at other paths: `layers.0`, `model.layers.0`, and in a multimodal
    model `model.language_model.layers.0`.

    Raises:
        AdapterError: the model has none of its modules, or several that may be meant, or not all rows of its
            vocabulary are known.
    """
    modules = dict(model.named_modules())
    paths = {
        key: key.removeprefix(OUTER).replace(".modules_to_save.", ".")
        for key in stored
        if key.startswith(OUTER) and _ORIGINAL not in key
    }
    owners = {key: _owner(path) for key, path in paths.items()}
    tuned = list(dict.fromkeys(owners[key] for key, path in paths.items() if _tuner().search(path)))
    homeless = [owner for owner in tuned if owner not in modules]
    move = _find_move(name, model, modules, _shapes(stored, owners, homeless)) if homeless else _Move("", "")
    moved = {key: key for key in stored if not key.startswith(OUTER)}
    left_out = []
    for key, path in paths.items():
        place = owners[key] if owners[key] in modules else move(owners[key])
        # Where a module alone is missing, its tensor keeps its name: PEFT will report it, and it is refused.
        if place in modules or not _lacks_part((owners[key], place), modules):
            moved[key] = OUTER + (place if place in modules else owners[key]) + path[len(owners[key]) :]
        else:
            left_out.append(key)
    if tuned and not any(move(owner) in modules or owner in modules for owner in tuned) and left_out:
        raise AdapterError(
            f"{name} does not fit {type(model).__name__}: {len(left_out)} of its tensors have no counterpart "
            f"there, first {left_out[0]}. Put it on the model that it was trained on."
        )
    at = {owner: owner if owner in modules else move(owner) for owner in tuned}
    at = {owner: place for owner, place in at.items() if place in modules}
    is_elsewhere = bool(left_out) or any(owner != place for owner, place in at.items())
    return Fit(moved, tuple(left_out), at if is_elsewhere else None, _rows(name, model, stored, moved))


def adjust(config: Any, fit: Fit, modules: Iterable[str]) -> None:
    """Make PEFT's configuration name the modules of this model on which the adapter acts."""
    names = list(modules)
    saved = getattr(config, "modules_to_save", None)
    if saved:
        config.modules_to_save = [each for each in saved if any(n.endswith(each) for n in names)] or None
    if not fit.paths or getattr(config, "target_modules", None) is None:
        return
    # By their full paths: a short name, such as q_proj, would match in a tower that training did not have.
    config.target_modules = set(fit.paths.values())
    # These would select a second time, by the paths of the class in training.
    for setting in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if getattr(config, setting, None) is not None:
            setattr(config, setting, None)
    for setting in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, setting, None):
            setattr(config, setting, {fit.paths.get(key, key): value for key, value in pattern.items()})


def resize(model: PreTrainedModel, n_rows: int) -> None:
    """Give a model's embedding and LM head so many rows; those of a hollow model stay hollow."""
    was_hollow = is_hollow(model.get_input_embeddings().weight)
    # The caller's random state stays as it is. `mean_resizing` would take the covariance of all old rows.
    with torch.random.fork_rng(devices=[]):  # new rows are drawn at random, and then the adapter's are read
        model.resize_token_embeddings(n_rows, mean_resizing=False)
    model.requires_grad_(requires_grad=False)
    if was_hollow:
        made: dict[int, Tensor] = {}
        for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            weight = module.weight
            # A table that is tied to the LM head stays one parameter.
            module.weight = made.setdefault(id(weight), hollow(weight, weight.device))


@cache
def _tuner() -> re.Pattern[str]:
    """Return the pattern of PEFT's own part in the name of a tensor that acts on a module."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefixes = {re.escape(prefix) for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix}
    return re.compile(rf"\.(?:{'|'.join(sorted(prefixes))}|base_layer|token_adapter)")


def owner_of(key: str) -> str:
    """Return the path of the module that an adapter's tensor acts on, by the tensor's name."""
    return _owner(key.removeprefix(OUTER))


def _owner(path: str) -> str:
    """The path of the module that a tensor acts on, or belongs to."""
    found = _tuner().search(path)
    return path[: found.start()] if found else path.rpartition(".")[0]


def _shapes(
    stored: Mapping[str, Shaped], owners: Mapping[str, str], homeless: Sequence[str]
) -> dict[str, tuple[int | None, int | None]]:
    """Return the outputs and inputs of each module without a place, by LoRA factors; None if not known."""
    shapes: dict[str, tuple[int | None, int | None]] = dict.fromkeys(homeless, (None, None))
    for key, owner in owners.items():
        if owner in shapes and len(stored[key].shape) == 2:
            n_out, n_in = shapes[owner]
            if key.endswith(".lora_A.weight"):
                shapes[owner] = n_out, stored[key].shape[1]
            elif key.endswith(".lora_B.weight"):
                shapes[owner] = stored[key].shape[0], n_in
    return shapes


def _find_move(
    name: str, model: PreTrainedModel, modules: Modules, shapes: Mapping[str, tuple[int | None, int | None]]
) -> Callable[[str], str]:
    """Return the change of prefix that finds a module for the most paths that have none.

    Raises:
        AdapterError: several changes find as many, and not one of them alone leads to the text stack.
    """
    found: dict[frozenset[tuple[str, str]], _Move] = {}
    # One module of each kind is enough: those of other blocks differ in their numbers alone.
    for owner in {re.sub(r"\d+", "0", owner): owner for owner in shapes}.values():
        first = _NUMBER.search(owner)
        for cut in [0, *(dot.end() for dot in re.finditer(r"\.", owner[: first.start() if first else None]))]:
            # The path from the first number on, such as layers.0.self_attn, is never cut.
            end = owner[cut:]
            for module in modules:
                if module == end or module.endswith(f".{end}"):
                    move = _Move(owner[:cut], module[: len(module) - len(end)])
                    placed = frozenset(
                        (each, move(each))
                        for each, shape in shapes.items()
                        if each.startswith(move.old) and _fits(modules.get(move(each)), shape)
                    )
                    if placed:
                        found.setdefault(placed, move)
    if not found:
        return _Move("", "")
    most = max(len(placed) for placed in found)
    best = {placed: move for placed, move in found.items() if len(placed) == most}
    if len(best) > 1:
        text = _text_stack(model)
        # A vision tower may have modules of the same paths; an adapter is meant for the text stack.
        best = {p: m for p, m in best.items() if all(new.startswith(f"{text}.") for _, new in p)} or best
    placed, move = next(iter(best.items()))
    targets = {new for _, new in placed}
    # Another move that would bring other modules of the adapter to the same places.
    rivals = [
        each
        for other, each in found.items()
        if other != placed
        and not {old for old, _ in other} & {old for old, _ in placed}
        and {new for _, new in other} & targets
    ]
    if len(best) > 1 or rivals:
        several = [*best.values()] if len(best) > 1 else [move, *rivals]
        ways = ", ".join(f"{each.old or 'its modules'} to {each.new or 'the model'}" for each in several)
        raise AdapterError(
            f"{name}: which part of {type(model).__name__} it acts on is not clear ({ways}). Merge it where "
            "it was trained, and compare the merged model."
        )
    return move


def _fits(module: nn.Module | None, shape: tuple[int | None, int | None]) -> bool:
    """Return whether there is a module, and a LoRA of that shape may be on it."""
    if not isinstance(module, nn.Linear):
        return module is not None
    sizes = (module.out_features, module.in_features)
    return all(wanted in (None, size) for wanted, size in zip(shape, sizes, strict=True))


def _text_stack(model: PreTrainedModel) -> str | None:
    """The path of the text stack in a model; None where there is none inside of it."""
    try:
        stack = dissect(model).stack
    except BlocksNotFoundError:
        return None
    return next((name for name, module in model.named_modules() if module is stack), None)


def _lacks_part(paths: Iterable[str], modules: Modules) -> bool:
    """Return whether the model lacks the part that a module is in, and not just this module of it.

    An adapter for more blocks, or for other modules of a block, does not fit. One with a score head, or with
    what is for a tower that is not here, does without it.
    """
    for path in paths:
        parents = [path[: dot.start()] for dot in re.finditer(r"\.", path)]
        deepest = next((parent for parent in reversed(parents) if parent in modules), "")
        if isinstance(modules[deepest], nn.ModuleList) or _NUMBER.search(deepest):
            return False
    return True


def _rows(
    name: str, model: PreTrainedModel, stored: Mapping[str, Shaped], moved: Mapping[str, str]
) -> int | None:
    """The rows of the vocabulary in training, where the model has another number.

    Raises:
        AdapterError: it does not bring the rows of its new tokens.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding):
        return None
    places = {path: module for path, module in model.named_modules() if module in (table, head)}
    rows, brought = set[int](), set[str]()
    for key, place in moved.items():
        path = _owner(place.removeprefix(OUTER))
        if path in places and "lora_embedding_A" in key:
            rows.add(stored[key].shape[1])
        elif (
            path in places and key.endswith(".weight") and (".base_layer." in key or not _tuner().search(key))
        ):
            rows.add(stored[key].shape[0])
            brought.add(path)
    # Tensors of two sizes do not tell what the vocabulary was.
    if len(rows) != 1 or rows == {table.num_embeddings}:
        return None
    n_rows = rows.pop()
    is_tied = head is not None and head.weight is table.weight
    lacking = [path for path, module in places.items() if path not in brought and not (is_tied and brought)]
    if lacking:
        raise AdapterError(
            f"{name}: was trained with a vocabulary of {n_rows} rows, the model has {table.num_embeddings}, "
            f"and what {lacking[0]} held in the others is not in the adapter. Merge it where it was trained, "
            "and compare the merged model."
        )
    return n_rows
