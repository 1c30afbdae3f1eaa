"""What an adapter adds to the tensors of its model, computed tensor by tensor; no model is merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus.errors import UnsupportedModelError
from lazarus.models import Source
from lazarus.models.adapters import put_on, rewriting_start
from lazarus.models.faults import translated
from lazarus.models.layout import hollow, is_hollow
from lazarus.models.reference import adapter_settings
from lazarus.weights.checkpoints import Checkpoint, Entry, Stored
from lazarus.weights.parts import Take, as_matrix, lay_out
from lazarus.weights.views import AddedView, MemoryView, Rows, Update, View, type_name

ADAPTER = "default"
_KEPT = 2
"""Layers whose update is kept beside those that are being read."""


@dataclass(frozen=True, eq=False)
class Product:
    """A low-rank update, `left` [rows, rank] times `right` [rank, columns], in float64."""

    left: Float64[Tensor, "rows rank"]
    right: Float64[Tensor, "rank columns"]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.shape[0], self.right.shape[1]

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop."""
        return self.left[start:stop] @ self.right

    def part(self, take: Take) -> Product | None:
        """The part that is whole rows, or whole columns, of the matrix; None of any other."""
        n_rows, n_columns = self.matrix
        dims, index = take.dims, take.index
        has_rows = any(isinstance(each, slice) for each in index) or len(index) < len(dims) - 1
        if dims[-1] == n_columns and len(index) < len(dims) and has_rows:
            return Product(self.left[torch.arange(n_rows).view(dims[:-1])[index].reshape(-1)], self.right)
        if dims[0] == n_rows and index[0] == slice(None):
            columns = torch.arange(n_columns).view(dims[1:])[index[1:]]
            return Product(self.left, self.right[:, columns]) if columns.ndim == 1 else None
        return None


@dataclass(frozen=True, eq=False)
class Merged:
    """The update of one tensor by an adapter's own rule, whatever it is: what merging adds, in float64."""

    layers: _Layers
    module: str
    attribute: str
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return as_matrix(self.shape)

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop."""
        return self._whole()[start:stop]

    def rows(self) -> AbstractContextManager[Rows]:
        """The rows of the update, which is in memory as long as they are read."""
        return nullcontext(MemoryView(self._whole(), "float64"))

    def _whole(self) -> Tensor:
        return self.layers.update(self.module)[self.attribute].reshape(self.matrix)


@dataclass(frozen=True, eq=False)
class Taken:
    """The part of an update that belongs to one component of a fused tensor of shape `whole`."""

    update: Update
    whole: tuple[int, ...]
    take: Take

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return lay_out(self.whole, self.take, torch.float64).matrix

    def read(self, start: int, stop: int, /) -> Float64[Tensor, "rows columns"]:
        """Rows start to stop."""
        return self._view().read(start, stop)

    def rows(self) -> AbstractContextManager[Rows]:
        """The rows of the part, which is in memory as long as they are read."""
        return nullcontext(self._view())

    def _view(self) -> MemoryView:
        everything = self.update.read(0, self.update.matrix[0]).reshape(self.whole)
        part = MemoryView(everything, "float64", self.take).part
        return MemoryView(part.contiguous(), "float64")


def put_adapter(checkpoint: Checkpoint, adapter: Source) -> tuple[Checkpoint, str]:
    """The checkpoint as it is with an adapter, and the adapter's type.

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
    model, kind = put_on(_hollow_copy(empty), adapter)
    brought = _brought(model, empty)
    updates = _Layers(model, checkpoint.stored, brought, adapter).updates()
    entries = {
        place: replace(entry, view=_changed(entry, checkpoint.stored[entry.path], updates, brought))
        for place, entry in checkpoint.entries.items()
    }
    known, doubles = {entry.path for entry in entries.values()}, _doubles(brought)
    for path in brought.keys() - known - doubles.keys():  # a head of its own, where the model's was tied
        for part in checkpoint.structure.parts(path, tuple(brought[path].shape)):
            view = MemoryView(brought[path], type_name(brought[path].dtype), part.take)
            entries[part.place] = Entry(part.place, path, path, part.take, view)
    for place, owner in checkpoint.tied.items():
        path = entries[owner].path
        if place not in entries and path in _copied(model) and path not in doubles.values():
            entries[place] = replace(checkpoint.entries[owner], place=place)  # PEFT leaves it what it was
    tied = {place: owner for place, owner in checkpoint.tied.items() if place not in entries}
    return replace(checkpoint, entries=entries, tied=tied), kind


def _changed(
    entry: Entry, stored: Stored, updates: Mapping[str, Update], brought: Mapping[str, Tensor]
) -> View:
    """A component's numbers with the adapter: as they were, with an update on top, or the adapter's own."""
    view = entry.view
    if entry.path in brought:
        tensor = brought[entry.path]
        view = MemoryView(tensor, type_name(tensor.dtype), entry.take)
    update = updates.get(entry.path)
    if update is None:
        return view
    if entry.take is None:
        return AddedView(view, update)
    product = update.part(entry.take) if isinstance(update, Product) else None
    return AddedView(view, product or Taken(update, stored.shape, entry.take))


def _hollow_copy(empty: PreTrainedModel) -> PreTrainedModel:
    """A second empty model, on the CPU and without memory all the same, for an adapter to be put on."""
    cpu = torch.device("cpu")
    memo: dict[int, Any] = {id(p): hollow(p, cpu) for p in empty.parameters()}
    return copy.deepcopy(empty, memo)


def _brought(model: PreTrainedModel, empty: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the model that the adapter brings whole, by their paths: a head, biases."""
    own = set(empty.state_dict())
    found = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        path = _path(name)
        if path in own and ".original_module." not in name and not tensor.is_meta and not is_hollow(tensor):
            found[path] = tensor.detach()
    return found


def _doubles(brought: Mapping[str, Tensor]) -> dict[str, str]:
    """Paths at which a tensor is that of another path: what PEFT has tied to what the adapter brings."""
    first: dict[int, str] = {}
    owners = {path: first.setdefault(tensor.data_ptr(), path) for path, tensor in brought.items()}
    return {path: owner for path, owner in owners.items() if path != owner}


def _copied(model: PreTrainedModel) -> set[str]:
    """The paths of parameters that the adapter has in a copy of their module (`modules_to_save`)."""
    return {_path(name) for name, _ in model.named_parameters() if f".modules_to_save.{ADAPTER}." in name}


def _path(name: str) -> str:
    """A parameter's name without what PEFT puts around its module."""
    for wrapper in (".base_layer", ".token_adapter", f".modules_to_save.{ADAPTER}"):
        name = name.replace(wrapper, "")
    return name


class _Layers:
    """The layers of a hollow model that carry an adapter."""

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, Stored],
        brought: Mapping[str, Tensor],
        adapter: Source,
    ) -> None:
        self._stored = stored
        self._brought = brought
        self._adapter = adapter
        self._found = {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
        self.update = lru_cache(maxsize=_KEPT)(self._merge)

    def updates(self) -> dict[str, Update]:
        """The update of every tensor that an adapter changes, by the tensor's path.

        Raises:
            UnsupportedModelError: the checkpoint stores such a tensor in pieces, or an adapter is on another.
        """
        return {path: update for name in self._found for path, update in self._of(name)}

    def _of(self, name: str) -> Iterator[tuple[str, Update]]:
        layer, module = self._found[name], _path(name)
        if hasattr(layer, "parameter_name") or hasattr(layer.base_layer, "base_layer"):
            raise self._refusal(module, "is on single parameters of it, or on top of another")
        product = _product(layer)
        for attribute, parameter in layer.base_layer.named_parameters(recurse=False):
            path = f"{module}.{attribute}"
            if path not in self._stored:
                raise self._refusal(path, "is on a tensor that the checkpoint stores in pieces or not at all")
            if product is not None:
                if attribute == "weight":
                    yield path, product
            else:
                yield path, Merged(self, name, attribute, tuple(parameter.shape))

    def _merge(self, name: str) -> dict[str, Tensor]:
        """What merging one layer adds to each of its tensors, in float64."""
        layer, module = copy.deepcopy(self._found[name]), _path(name)
        base: Any = layer.base_layer
        before = {}
        for attribute, _ in list(base.named_parameters(recurse=False)):
            tensor = before[attribute] = self._tensor(f"{module}.{attribute}")
            setattr(base, attribute, nn.Parameter(tensor.clone(), requires_grad=False))
        merging: Any = layer.double()
        with torch.no_grad(), translated(self._adapter.name):
            merging.merge(adapter_names=[ADAPTER])
        merged = merging.base_layer  # LNTuning puts another one there
        return {name: getattr(merged, name).detach() - tensor for name, tensor in before.items()}

    def _tensor(self, path: str) -> Tensor:
        """A tensor of the model as the adapter finds it, in float64."""
        if path in self._brought:
            return self._brought[path].to(torch.float64)
        view = self._stored[path].view(None)
        return view.read(0, view.matrix[0]).reshape(view.shape).to(torch.float64)

    def _refusal(self, module: str, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._adapter.name}: what it adds to {module} cannot be computed by itself: it {reason}. "
            "Merge the adapter and compare the merged model."
        )


def _product(layer: Any) -> Product | None:
    """A plain LoRA layer's update; None where the adapter has another rule than scaling·B·A."""
    from peft.tuners.lora import Embedding, Linear

    if type(layer) not in (Linear, Embedding) or layer.lora_variant.get(ADAPTER) is not None:
        return None
    if layer.lora_bias.get(ADAPTER):
        return None
    scaling = float(layer.scaling[ADAPTER])
    if type(layer) is Embedding:
        a, b = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
        return Product(a.T.double() * scaling, b.T.double())
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    if layer.fan_in_fan_out:
        return Product(a.T.double() * scaling, b.T.double())
    return Product(b.double() * scaling, a.double())
