"""The order in which an empty model is read: blocks, a large LM head, rows of large embeddings.

"Empty" is a model without memory, on torch's device `meta`.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus.models.checkpoint import Conversion, names_loaded
from lazarus.models.faults import translated
from lazarus.models.quantised import same_weights
from lazarus.models.stored import TORCH_DTYPES, StoredTensor
from lazarus.models.tables import Place, Table

SMALL_BYTES = 2**26
"""embeddings and LM heads below this size are in memory all the time"""

Places = Mapping[str, Sequence[Place]]
"""for each name of a tensor, all places of the model that hold that tensor"""


class Reader:
    """Reads a checkpoint's parameters by their targets, into an empty copy of the model that never runs."""

    def __init__(self, model: PreTrainedModel, conversion: Conversion) -> None:
        self.conversion = conversion
        self.bytes_read = 0
        # In the memo, so that deepcopy shares what is in memory instead of copying it.
        filled = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
        self._empty = copy.deepcopy(model, dict[int, Any](filled))
        self._lock = Lock()

    def read(self, targets: Iterable[str]) -> dict[str, Tensor]:
        """Read the parameters and buffers that the sources of these targets make, by their names.

        Raises:
            WeightsError: a file is gone, or was cut short since its header was read.
        """
        keys = [key for target in targets for key in self.conversion.sources[target]]
        if not keys:
            return {}
        with self._lock, translated(self._empty.name_or_path):
            before = self._empty.state_dict(keep_vars=True)
            loaded = names_loaded(self._empty, self.conversion.convert(self._empty, keys))
            after = self._empty.state_dict(keep_vars=True)
            # The copy is emptied again: the caller alone keeps what was read in memory.
            for name in loaded:
                owner, _, attribute = name.rpartition(".")
                setattr(self._empty.get_submodule(owner), attribute, before[name])
            self.bytes_read += self.conversion.n_bytes(keys)
        return {name: after[name].requires_grad_(requires_grad=False) for name in loaded}


class StoredComparison:
    """StoredComparison of the elements of two checkpoints' tensors, each when it is first asked for."""

    def __init__(self, base: Conversion, finetuned: Conversion) -> None:
        self._base = base
        self._finetuned = finetuned
        self._known: dict[str, bool] = {}

    def is_same(self, target: str) -> bool:
        """Return whether the sources of a target are the same, bit for bit.

        Raises:
            WeightsError: a file is gone, or was cut short since its header was read.
        """
        if self._base is self._finetuned:
            return True
        if target not in self._known:
            ours, theirs = (each.sources.get(target) for each in (self._base, self._finetuned))
            self._known[target] = (
                ours is not None and ours == theirs and all(map(self._is_stored_alike, ours))
            )
        return self._known[target]

    def _is_stored_alike(self, key: str) -> bool:
        ours, theirs = self._base.stored[key], self._finetuned.stored[key]
        with translated(theirs.path):
            return same_weights(ours, theirs)


@dataclass(frozen=True)
class Unit:
    """Tensors that are loaded and freed together: a block, or the LM head."""

    targets: tuple[str, ...]
    empty: Mapping[str, Tensor]
    """each of its parameters, as it is while it is not loaded"""

    @property
    def n_bytes(self) -> int:
        """Its size in memory."""
        return sum(tensor.nbytes for tensor in self.empty.values())


@dataclass(frozen=True)
class ReadingOrder:
    """Order in which the parts of a model are read: the blocks as they run, and the LM head last."""

    units: tuple[Unit, ...]
    rest: tuple[str, ...]
    """the targets that are read at once and stay"""
    tables: Mapping[str, Table]
    """the embeddings that are read by rows, by the names of their weights"""
    head_table: Table | None
    """the one that is the weight of the LM head too"""
    places: Places


def lay_out(model: PreTrainedModel, blocks: Sequence[nn.Module], conversion: Conversion) -> ReadingOrder:
    """Decide what of an empty model is read when. What two blocks have in common is part of the rest."""
    state = model.state_dict(keep_vars=True)
    places, owners = places_of(model), _owners(model, blocks)
    outside = {name for name, tensor in state.items() if owners[id(tensor)] == {None}}
    tables = _tables(model, conversion, places, outside)
    head = model.get_output_embeddings()
    head_names, head_table = set[str](), None
    if isinstance(head, nn.Linear) and head.weight.nbytes >= SMALL_BYTES:
        weight = _names_of(head.weight, state)
        head_table = next((table for name, table in tables.items() if name in weight), None)
        # An LM head that is tied to a table is held and released with it; tied to anything else, it stays.
        if head_table is None and weight <= outside and len(places[next(iter(weight))]) == 1:
            head_names = weight
    names = [{n for n, t in state.items() if owners[id(t)] == {index}} for index in range(len(blocks))]
    units = [_unit(each, state, conversion) for each in (*names, head_names)]
    apart = {target for unit in units for target in unit.targets} | set(tables)
    rest = tuple(target for target in conversion.sources if target not in apart)
    # Last, because joining puts another Parameter in place, and all above goes by identity.
    for name, table in tables.items():
        table.join(places[name])
    return ReadingOrder(tuple(units), rest, tables, head_table, places)


def _unit(names: set[str], state: Mapping[str, Tensor], conversion: Conversion) -> Unit:
    targets = tuple(target for target in conversion.sources if target in names)
    return Unit(targets, {name: state[name] for name in names if state[name].is_meta})


def _names_of(tensor: Tensor, state: Mapping[str, Tensor]) -> set[str]:
    return {name for name, other in state.items() if other is tensor}


def _tables(
    model: PreTrainedModel, conversion: Conversion, places: Places, outside: set[str]
) -> dict[str, Table]:
    """Return the large embeddings outside the blocks that are stored as they are; none on other devices."""
    # An embedding of the whole size costs no memory on a CPU until its rows are written; on a GPU it does.
    if conversion.device.type != "cpu":
        return {}
    tables: dict[str, Table] = {}
    for name in conversion.sources:
        module, attribute = places[name][0]
        weight, stored = getattr(module, attribute), conversion.stored[conversion.sources[name][0]]
        if (
            name in outside
            and any(_reads_by_id(m) for m, _ in places[name])
            and conversion.is_plain(name)
            and weight.nbytes >= SMALL_BYTES
            and isinstance(stored, StoredTensor)
            and stored.dtype in TORCH_DTYPES
            and tuple(weight.shape) == stored.shape
        ):
            tables[name] = Table(stored, weight.dtype)
    return tables


def _reads_by_id(module: nn.Module) -> bool:
    """Return whether a module is an embedding of the ids that it is called with.

    Some embeddings of positions compute their own ids.
    """
    taken = list(inspect.signature(type(module).forward).parameters)[1:]
    return isinstance(module, nn.Embedding) and taken in (["input"], ["input_ids"])


def places_of(model: PreTrainedModel) -> dict[str, list[Place]]:
    """Return all places of the model that hold a tensor, for each name of the state dict."""
    found: dict[int, list[Place]] = defaultdict(list)
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[id(tensor)].append((module, attribute))
    return {name: found[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}


def _owners(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> dict[int, set[int | None]]:
    """Return the blocks that hold each tensor; None stands for whatever is outside the blocks."""
    owners: dict[int, set[int | None]] = defaultdict(set)
    inside = {id(module) for block in blocks for module in block.modules()}
    for index, block in enumerate(blocks):
        for tensor in (*block.parameters(), *block.buffers()):
            owners[id(tensor)].add(index)
    for module in model.modules():
        if id(module) not in inside:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                owners[id(tensor)].add(None)
    return owners


def hollow(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a parameter of the same dtype and shape on a real device, without memory: one zero, expanded.

    The zero is the second of two in its memory, so that `is_hollow` knows even a single element from a real
    one.
    """
    one = torch.zeros(2, dtype=tensor.dtype, device=device)[1]
    return nn.Parameter(one.expand(tensor.shape), requires_grad=False)


def is_hollow(tensor: Tensor) -> bool:
    """Return whether a tensor was made by `hollow`."""
    two = 2 * tensor.element_size()
    lone = tensor.storage_offset() == 1 and tensor.untyped_storage().nbytes() == two
    return lone and not any(tensor.stride())
