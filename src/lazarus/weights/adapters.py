"""A checkpoint with an adapter: which of its tensors the adapter changes, and how. No model is merged.

PEFT is asked, on an empty copy of the model: the layers that it puts there are those that would run.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus.blame import one_line
from lazarus.errors import ModelError, UnsupportedModelError
from lazarus.models import Source
from lazarus.models.adapters import put_on, rewriting_start
from lazarus.models.equality import is_one
from lazarus.models.faults import translated
from lazarus.models.layout import hollow, is_hollow
from lazarus.models.reference import adapter_settings
from lazarus.names.components import Place
from lazarus.names.parts import Take
from lazarus.notes import Notes
from lazarus.weights.checkpoints import Checkpoint, Entry
from lazarus.weights.updates import ADAPTER, Merged, Product, Replaced, low_rank, part_of_update
from lazarus.weights.views import AddedView, MemoryView, Update, View, dtype_name

_KEPT = 2
"""Layers whose update is kept beside those that are being read."""


@dataclass(frozen=True)
class _Effect:
    """The update of one parameter of the model, of that shape."""

    update: Update
    shape: tuple[int, ...]


def put_adapter(checkpoint: Checkpoint, adapter: Source, notes: Notes) -> tuple[Checkpoint, str]:
    """Return the checkpoint as it is with an adapter, and the adapter with its type and its commit.

    Raises:
        AdapterError: it does not fit the model, or works by virtual tokens instead of weights.
        UnsupportedModelError: it is on tensors that cannot be told apart.
    """
    empty = checkpoint.structure.model
    if empty is None:
        raise UnsupportedModelError(
            f"{adapter.name}: {checkpoint.source.name} has Python code of its own, so where its adapter "
            "belongs is not known. Merge the adapter and compare the merged model."
        )
    start = rewriting_start(adapter_settings(adapter))
    if start is not None:
        raise UnsupportedModelError(
            f"{adapter.name}: its start ({start}) was taken off its model's weights, which takes the whole "
            "model to undo. Merge the adapter and compare the merged model."
        )
    of_files = Notes()
    adapted = put_on(_hollow_copy(empty, checkpoint), adapter, of_files)
    brought = {**_brought(adapted.model, empty), **{_path(n): t for n, t in adapted.left_out.items()}}
    changed = _Layers(adapted.model, checkpoint, brought, adapter).applied(notes)
    notes.extend(of_files)  # what the adapter does comes before what its files are
    return replace(changed, unread=(*changed.unread, *adapted.unread)), adapted.description


def _hollow_copy(empty: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """Return a second empty model on which an adapter can be put: on the CPU, and still without memory.

    Its parameters are tied as they are when the checkpoint has been loaded: an adapter may bring one of them.
    """
    cpu = torch.device("cpu")
    memo: dict[int, Any] = {id(p): hollow(p, cpu) for p in empty.parameters()}
    for path, place in checkpoint.tied_paths.items():
        owner = checkpoint.entries[checkpoint.tied[place]].path
        memo[id(empty.get_parameter(path))] = memo[id(empty.get_parameter(owner))]
    return copy.deepcopy(empty, memo)


def _brought(model: PreTrainedModel, empty: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of the model that the adapter brings whole, by their paths: an LM head, biases."""
    own = set(empty.state_dict())
    found = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        path = _path(name)
        # A parameter that is still hollow is the model's own: what the adapter brought has memory.
        if path in own and ".original_module." not in name and not tensor.is_meta and not is_hollow(tensor):
            found[path] = tensor.detach()
    return found


def _path(name: str) -> str:
    """A parameter's name without what PEFT puts around its module."""
    for wrapper in (".base_layer", ".token_adapter", f".modules_to_save.{ADAPTER}"):
        name = name.replace(wrapper, "")
    return name


class _Layers:
    """The layers of a hollow model that carry an adapter."""

    def __init__(
        self, model: PreTrainedModel, checkpoint: Checkpoint, brought: Mapping[str, Tensor], adapter: Source
    ) -> None:
        self._checkpoint = checkpoint
        self._brought = brought
        self._adapter = adapter
        # Layers of PEFT, of whatever type, keep the module that they wrap under this name.
        self._layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
        self._owners = {path: checkpoint.tied[place] for path, place in checkpoint.tied_paths.items()}
        self._by_path: dict[str, list[Entry]] = defaultdict(list)
        for entry in checkpoint.entries.values():
            self._by_path[entry.path].append(entry)
        # A layer is merged once for its weight and its bias. The cache is freed with this object.
        self._merge = lru_cache(maxsize=_KEPT)(self._merge_layer)

    def applied(self, notes: Notes) -> Checkpoint:
        """Return the checkpoint with every change that the adapter makes.

        Raises:
            UnsupportedModelError: a change cannot be brought to the tensors that the files hold.
        """
        effects = {path: effect for name in self._layers for path, effect in self._effects(name)}
        entries = {
            place: replace(entry, view=self._brought_view(entry.path, entry.take) or entry.view)
            for place, entry in self._checkpoint.entries.items()
        }
        entries |= self._new_entries()
        for path, effect in effects.items():
            # A tied parameter is no entry: it changes with its owner, unless `_parted` finds otherwise.
            if path not in self._owners:
                entries |= self._changed(path, effect, entries)
        entries |= self._parted(effects, notes)
        tied = {place: owner for place, owner in self._checkpoint.tied.items() if place not in entries}
        paths = {path: place for path, place in self._checkpoint.tied_paths.items() if place in tied}
        return replace(self._checkpoint, entries=entries, tied=tied, tied_paths=paths)

    def _brought_view(self, path: str, take: Take | None) -> View | None:
        tensor = self._brought.get(path)
        return None if tensor is None else MemoryView(tensor, dtype_name(tensor.dtype), take)

    def _new_entries(self) -> dict[Place, Entry]:
        """Return what the adapter brings of the model that the files do not hold."""
        found = {}
        for path, tensor in self._brought.items():
            if path in self._by_path or path in self._owners:
                continue
            for part in self._checkpoint.structure.parts(path, tuple(tensor.shape)):
                view = MemoryView(tensor, dtype_name(tensor.dtype), part.take)
                found[part.place] = Entry(part.place, path, path, part.take, view)
        return found

    def _changed(
        self, path: str, effect: _Effect, entries: Mapping[Place, Entry]
    ) -> Iterator[tuple[Place, Entry]]:
        """Yield the components of one parameter, with its update on top."""
        for place, take in self._components(path, effect.shape):
            entry = entries[place]
            update = part_of_update(effect.update, effect.shape, take)
            yield place, replace(entry, view=AddedView(entry.view, update))

    def _components(self, path: str, shape: tuple[int, ...]) -> list[tuple[Place, Take | None]]:
        """Return where the components of a parameter are, and which part of it each is.

        The files may hold it as one tensor, or in pieces: each projection of each expert.

        Raises:
            UnsupportedModelError: its pieces are not all there, or not as they are in the parameter.
        """
        own = self._by_path.get(path)
        if own and all(entry.in_order for entry in own):
            return [(entry.place, entry.take) for entry in own]
        found = []
        for part in self._checkpoint.structure.parts(path, shape):
            entry = self._checkpoint.entries.get(part.place)
            # For its shape alone.
            whole = MemoryView(torch.empty(shape, device="meta"), "", part.take)
            if own or entry is None or not entry.in_order or entry.view.shape != whole.shape:
                raise self._refusal(
                    path, "is on a tensor that the files hold in another layout, or not at all"
                )
            found.append((part.place, part.take))
        return found

    def _parted(self, effects: Mapping[str, _Effect], notes: Notes) -> Iterator[tuple[Place, Entry]]:
        """Yield the tied parameters that the adapter parts from their owners.

        It changes one alone, or both otherwise.
        """
        for path, owner in self._owners.items():
            source = self._checkpoint.entries[owner]
            ours, theirs = effects.get(path), effects.get(source.path)
            is_same_tensor = _same_tensor(self._brought.get(path), self._brought.get(source.path))
            if is_same_tensor and _same_update(ours, theirs):
                continue
            place = self._checkpoint.tied_paths[path]
            view = self._brought_view(path, None) or source.view
            if ours is not None:
                view = AddedView(view, ours.update)
            elif path not in self._brought or is_same_tensor:
                notes.add(
                    "tied-tensors",
                    f"{self._adapter.name} acts on {owner.component} and not on {place.component}, which is "
                    "tied to it: unmerged they differ, and a merge into the one tensor would change both",
                    model=self._adapter.name,
                )
            key = path if path in self._brought else source.key
            yield place, Entry(place, key, path, None, view)

    def _effects(self, name: str) -> Iterator[tuple[str, _Effect]]:
        layer, module = self._layers[name], _path(name)
        if hasattr(layer, "parameter_name"):  # PEFT puts those of one module around each other
            base = layer.get_base_layer()
            yield self._of_parameter(f"{module}.{layer.parameter_name}", layer, base)
            return
        base = layer.base_layer
        if hasattr(base, "base_layer"):
            raise self._refusal(module, "is on top of another")
        if hasattr(layer, "trainable_tokens_delta"):
            path, shape = f"{module}.weight", tuple(base.weight.shape)
            yield path, _Effect(self._replaced(path, shape, layer), shape)
            return
        product = low_rank(layer)
        for attribute, parameter in base.named_parameters(recurse=False):
            path, shape = f"{module}.{attribute}", tuple(parameter.shape)
            if product is None:
                yield path, _Effect(Merged(partial(self._merged, name, attribute), shape), shape)
            # The other parameters, such as a bias, a plain LoRA leaves as they are.
            elif attribute == "weight":
                yield path, _Effect(product, shape)

    def _of_parameter(self, path: str, layer: Any, base: nn.Module) -> tuple[str, _Effect]:
        """Return the update by a LoRA on one parameter, most often that of all experts.

        llama.cpp stores an expert's matrix by outputs, also where the model's parameter is by inputs.
        """
        shape = tuple(layer.get_param().shape)
        is_turned = getattr(base, "is_transposed", False) and self._checkpoint.source.gguf_file is not None
        update = low_rank(layer)
        if update is None or is_turned or update.matrix != MemoryView(layer.get_param(), "").matrix:
            raise self._refusal(path, "is on a parameter whose layout it does not share")
        return path, _Effect(update, shape)

    def _replaced(self, path: str, shape: tuple[int, ...], layer: Any) -> Replaced:
        """The rows of the tokens that were trained, in place of the table's."""
        rows = {int(token) % shape[0]: row for row, token in enumerate(layer.token_indices[ADAPTER])}
        tokens = sorted(rows)
        new = layer.trainable_tokens_delta[ADAPTER].detach().double()[[rows[token] for token in tokens]]
        table = self._view(path, shape)
        # A copy, because the next row may be read into the same memory.
        old = [table.read(token, token + 1).double().clone() for token in tokens]
        index = torch.tensor(tokens, dtype=torch.int64)
        return Replaced((shape[0], shape[1]), index, new - torch.cat(old))

    def _view(self, path: str, shape: tuple[int, ...]) -> View:
        """Return a tensor of the model as the adapter finds it.

        Raises:
            UnsupportedModelError: the files do not hold it, or in another layout.
        """
        entries = self._by_path.get(path)
        if path in self._owners:
            entries = [self._checkpoint.entries[self._owners[path]]]
        brought = self._brought_view(path, None)
        if brought is not None:
            return brought
        if entries is None or len(entries) != 1 or entries[0].take is not None:
            return MemoryView(self._joined(path, shape), "float64")
        return entries[0].view

    def _joined(self, path: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter that the files hold in pieces, or that is several components, in float64."""
        whole = torch.empty(shape, dtype=torch.float64)
        for place, take in self._components(path, shape):
            view = self._checkpoint.entries[place].view
            part = view.read(0, view.matrix[0]).reshape(view.shape)
            if take is None:
                whole.copy_(part)
            else:
                whole.view(take.dims)[take.index] = part.double()
        return whole

    def _merged(self, name: str, attribute: str, dtype: torch.dtype) -> Float64[Tensor, ...]:
        """Return what merging one layer adds to one of its tensors."""
        return self._merge(name, dtype)[attribute]

    def _merge_layer(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what merging one layer in a dtype adds to each of its tensors, in float64."""
        layer, module = copy.deepcopy(self._layers[name]), _path(name)
        base: Any = layer.base_layer
        before = {}
        # A list, because each parameter is replaced below.
        for attribute, parameter in list(base.named_parameters(recurse=False)):
            view = self._view(f"{module}.{attribute}", tuple(parameter.shape))
            # Copies: the merge changes the weight in place, and what was read may be overwritten.
            tensor = view.read(0, view.matrix[0]).reshape(view.shape).to(torch.float64, copy=True)
            before[attribute] = tensor
            setattr(base, attribute, nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False))
        merging: Any = layer.double() if dtype == torch.float64 else layer
        try:
            with torch.no_grad(), translated(self._adapter.name):
                merging.merge(adapter_names=[ADAPTER])
        except ModelError as error:
            reason = one_line(error.__cause__ or error)
            raise self._refusal(module, f"cannot be merged by PEFT ({reason})") from error
        merged = merging.base_layer  # LNTuning puts another one there
        return {name: getattr(merged, name).detach().double() - tensor for name, tensor in before.items()}

    def _refusal(self, module: str, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._adapter.name}: what it adds to {module} cannot be computed by itself: it {reason}. "
            "Merge the adapter and compare the merged model."
        )


def _same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether both are the model's own, or one tensor of the adapter that PEFT has tied."""
    if one is None or other is None:
        return one is other
    return is_one(one, other)


def _same_update(one: _Effect | None, other: _Effect | None) -> bool:
    """Return whether two tied parameters get the same: PEFT gives both the same factors, or the same rows."""
    if one is None or other is None:
        return one is other
    match one.update, other.update:
        case (Product(left=a, right=b), Product(left=c, right=d)):
            pairs = [(a, c), (b, d)]
        case (Replaced(index=a, change=b), Replaced(index=c, change=d)):
            pairs = [(a, c), (b, d)]
        case _:
            return False
    return all(torch.equal(x, y) for x, y in pairs)
