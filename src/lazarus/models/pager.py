"""A model of which the blocks are read from its files when they are needed, and forgotten afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus.models.checkpoint import Conversion
from lazarus.models.design import same_design
from lazarus.models.equality import Equality, Fault, every, fault_of, inert, same_bits
from lazarus.models.layout import Reader, ReadingOrder, StoredComparison, hollow, lay_out, places_of


class Pager:
    """Loads and frees the blocks of one model that was built empty.

    `base` is the pager of the model that it is compared with. A tensor that base holds at that time, and that
    has the same elements in both files, is taken from there instead of being read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        conversion: Conversion,
        base: Pager | None = None,
    ) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self.n_blocks = len(self.blocks)
        self.base = base
        self.conversion = conversion
        self._comparison: StoredComparison | None = None
        # Tensors are shared only where both models make the same parameters of the same elements.
        if base is not None and conversion.dtype == base.conversion.dtype and same_design(base.model, model):
            self._comparison = StoredComparison(base.conversion, conversion)
        self._is_twin = base is not None and base.conversion is conversion
        self._layout = self._as_base() if self._is_twin else lay_out(model, blocks, conversion)
        # After the layout: tables are then part of the model, and the copy shares them.
        self._reader = Reader(model, conversion)
        self._held: dict[int, WeakValueDictionary[str, Tensor]] = {}
        self._same_blocks: dict[int, bool] = {}
        self._equality = Equality()
        self._loaded: set[int] = set()
        self.seen: dict[int, dict[str, Fault]] = {}
        """of each block that was read, the parameters that are faulty, and how"""
        self._keeps_head = False
        self._load_rest()

    @property
    def device(self) -> torch.device:
        """Return where blocks are loaded to."""
        return self.conversion.device

    def is_table(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a large embedding, of which only the rows that are needed are there."""
        return any(table.is_weight(tensor) for table in self._layout.tables.values())

    @property
    def bytes_read(self) -> int:
        """Return what has been read of the files, as stored; what was read twice counts twice."""
        tables = [] if self._is_twin else self._layout.tables.values()
        return self._reader.bytes_read + sum(table.bytes_read for table in tables)

    def block_bytes(self, index: int) -> int:
        """Return the size of a block in memory, in the dtype in which it runs."""
        return self._layout.units[index].n_bytes

    def load(self, index: int) -> None:
        """Fill block `index`: its parameters are then those that `from_pretrained` gives, bit for bit."""
        self.put(index, self.read(index))

    def read(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of block `index`, by name. No module is touched, so that any thread may call it.

        Raises:
            WeightsError: a file is gone, or was cut short since its header was read.
        """
        tensors = self._from_base(index)
        left = [target for target in self._layout.units[index].targets if target not in tensors]
        tensors |= self._reader.read(left)
        # Weak, so that a block that was freed is not kept in memory for the sake of the other model.
        self._held[index] = WeakValueDictionary(tensors)
        return tensors

    def put(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill block `index` with what `read` returned."""
        if index not in self.seen:
            self.seen[index] = {name: fault for name, x in tensors.items() if (fault := fault_of(x))}
        self._assign(tensors)
        self._loaded.add(index)

    def free(self, index: int) -> None:
        """Free the parameters of block `index`; its buffers stay."""
        self._assign(self._layout.units[index].empty)
        self._loaded.discard(index)

    def same_as_base(self, index: int) -> bool:
        """Return whether block `index` is known to be base's: the same layers, the same weights in the files.

        Two blocks that are the same are compared to the end, once; of others a few bytes are read.
        """
        if index not in self._same_blocks:
            self._same_blocks[index] = self._is_same_as_base(index)
        return self._same_blocks[index]

    def _is_same_as_base(self, index: int) -> bool:
        if self.base is None or self._comparison is None:
            return False
        block, other = self.blocks[index], self.base.blocks[index]
        # None, not known, is not the same: such a block runs by itself.
        if self._equality.same_layers(other, block) is not True:
            return False
        # What is in memory all the time: tensors that another block holds too, and buffers.
        ours, theirs = (
            {n: t for n, t in (*m.named_parameters(), *m.named_buffers()) if n not in apart}
            for m, apart in ((block, self._apart(index)), (other, self.base._apart(index)))
        )
        return self._equality.same(theirs, ours) is True and all(
            map(self._comparison.is_same, self._layout.units[index].targets)
        )

    def _apart(self, index: int) -> set[str]:
        """The names, in the block, of what is read and freed with block `index`."""
        unit, block = self._layout.units[index], self.blocks[index]
        places = {(id(m), attribute) for name in unit.empty for m, attribute in self._layout.places[name]}
        return {
            f"{path}.{attribute}" if path else attribute
            for path, module in block.named_modules()
            for attribute in module._parameters.keys() | module._buffers.keys()
            if (id(module), attribute) in places
        }

    def has_weights_of(self, other: Pager) -> bool | None:
        """Return whether both models run on the same weights, bit for bit, however their files are laid out.

        It stops at the first block that differs; None where a tensor cannot be looked into.
        """
        ours, theirs = self._layout.units, other._layout.units
        if self.conversion is other.conversion:
            return True
        if self.conversion.dtype != other.conversion.dtype or len(ours) != len(theirs):
            return False
        if self._layout.places.keys() != other._layout.places.keys():
            return False
        compared = StoredComparison(other.conversion, self.conversion)
        tables = tuple(self._layout.tables), tuple(other._layout.tables)
        # The tables last: they are the largest, and a fine-tune seldom leaves all blocks alone.
        pairs = [*((one.targets, another.targets) for one, another in zip(ours, theirs, strict=True)), tables]
        answer = every(same_bits(self._at(name), other._at(name)) for name in self._filled(other))
        if answer is False:
            return False
        for one, another in pairs:
            # A weight that is tied in one of the two alone is read there under the name of the other.
            sources = [(self._source_of(t), other._source_of(t)) for t in dict.fromkeys((*one, *another))]
            unlike = [(s, o) for s, o in sources if s != o or not compared.is_same(s)]
            mine, its = self._reader.read({s for s, _ in unlike}), other._reader.read({o for _, o in unlike})
            # What a target makes besides the parameter of its own name.
            more = mine.keys() - {s for s, _ in unlike}
            if more != its.keys() - {o for _, o in unlike}:
                return False
            found = every(same_bits(mine[s], its[o]) for s, o in (*unlike, *((name, name) for name in more)))
            if found is False:
                return False
            answer = every((answer, found))
        return answer

    def load_head(self) -> None:
        """Load the LM head as a whole, if it is not in memory. A small one always is."""
        if self._head in self._loaded:
            return
        if self._layout.head_table is not None:
            self._layout.head_table.hold()
        self.load(self._head)

    def free_head(self) -> None:
        """Free the LM head, if it is not in memory all the time."""
        if self._head not in self._loaded or self._keeps_head:
            return
        if self._layout.head_table is not None:
            self._layout.head_table.release()
        self.free(self._head)

    def keep_embeddings(self) -> None:
        """Keep embeddings and LM head in memory from now on, for an adapter that copies or changes them."""
        for table in self._layout.tables.values():
            table.hold()
        self.load_head()
        self._keeps_head = True

    def use_blocks_on_demand(self) -> None:
        """Load a block or the LM head for each call that comes while it is not loaded, from now on."""
        for index, block in enumerate(self.blocks):
            self._on_demand(block, index, partial(self.load, index), partial(self.free, index))
        for module in self._head_modules():
            self._on_demand(module, self._head, self.load_head, self.free_head)
        for name, table in self._layout.tables.items():
            for module, _ in self._layout.places[name]:
                if isinstance(module, nn.Embedding):
                    module.register_forward_pre_hook(table.before_reading, with_kwargs=True)

    @contextmanager
    def hollow(self) -> Iterator[None]:
        """Give what is not loaded a dtype, a shape and a device, so that an adapter can be put on inside."""
        units = [(i, unit) for i, unit in enumerate(self._layout.units) if i not in self._loaded]
        for _, unit in units:
            self._assign({name: hollow(tensor, self.device) for name, tensor in unit.empty.items()})
        try:
            yield
        finally:
            for index, _ in units:
                self.free(index)

    @property
    def _head(self) -> int:
        """Return the index of the LM head's unit, which is the last."""
        return self.n_blocks

    def unfilled(self) -> list[str]:
        """Return the names of parameters that nothing will ever fill."""
        known = {name for unit in self._layout.units for name in unit.empty}
        state = self.model.state_dict(keep_vars=True)
        return sorted(name for name, tensor in state.items() if tensor.is_meta and name not in known)

    def _source_of(self, name: str) -> str:
        """The target that fills a tensor: its own, or that of the one it is tied to."""
        places, sources = self._layout.places, self.conversion.sources
        return name if name in sources else next(t for t in sources if places.get(t) is places[name])

    def _at(self, name: str) -> Tensor:
        module, attribute = self._layout.places[name][0]
        tensor: Tensor = getattr(module, attribute)
        return tensor

    def _filled(self, other: Pager) -> Iterator[str]:
        """The names of what is in memory whole, in this model and in another."""
        apart = {name for unit in self._layout.units for name in unit.empty}
        for pager in (self, other):
            for table in pager._layout.tables:
                apart |= {n for n, p in pager._layout.places.items() if p == pager._layout.places[table]}
        return (name for name in self._layout.places if name not in apart)

    def _as_base(self) -> ReadingOrder:
        """Base's layout over the places of this model, which was made over base's weights."""
        assert self.base is not None
        places = places_of(self.model)
        for name, table in self.base._layout.tables.items():
            table.join(places[name])
        return replace(self.base._layout, rest=(), places=places)

    def _load_rest(self) -> None:
        rest = self._layout.rest
        shared: dict[str, Tensor] = {}
        if self.base is not None and self._comparison is not None and not self._is_twin:
            common = {
                t for t in set(rest).intersection(self.base._layout.rest) if self.conversion.is_plain(t)
            }
            for target in filter(self._comparison.is_same, common):
                shared[target] = _alias(self.base._at(target))
        self._assign(shared)
        self._assign(self._reader.read(target for target in rest if target not in shared))

    def _from_base(self, index: int) -> dict[str, Tensor]:
        """Return what base holds of a block, if it is the same in both files."""
        if self.base is None or self._comparison is None:
            return {}
        held, unit = dict(self.base._held.get(index, {})), self._layout.units[index]
        names = {*unit.targets, *unit.empty}
        # An LM head that is tied here alone has no names in its unit: the one that base holds is not its own.
        if not held.keys() >= names:
            return {}
        same = [target for target in unit.targets if self._comparison.is_same(target)]
        if len(same) == len(unit.targets):
            return {name: _alias(held[name]) for name in names}
        one_by_one = len(held) == len(unit.targets)  # no target makes several parameters
        return {target: _alias(held[target]) for target in same} if one_by_one else {}

    def _assign(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for module, attribute in self._layout.places[name]:
                setattr(module, attribute, tensor)

    def _head_modules(self) -> list[nn.Module]:
        """Return the LM head's module, if it is not in memory all the time."""
        names = list(self._layout.units[self._head].empty)
        names += [name for name, table in self._layout.tables.items() if table is self._layout.head_table]
        places = [place for name in names for place in self._layout.places[name]]
        return [module for module, _ in places if not isinstance(module, nn.Embedding)]

    def _on_demand(
        self, module: nn.Module, index: int, load: Callable[[], None], free: Callable[[], None]
    ) -> None:
        own = vars(module).get("forward")
        for_this_call: list[int] = []

        @inert
        def before(_module: nn.Module, _args: Any) -> None:
            # A block whose forward was replaced for now, by a replay, does not run and needs no weights.
            if index not in self._loaded and vars(module).get("forward") is own:
                load()
                for_this_call.append(index)

        @inert
        def after(_module: nn.Module, _args: Any, _output: Any) -> None:
            if for_this_call:
                for_this_call.clear()
                free()

        module.register_forward_pre_hook(before)
        # Also after an exception: the block would stay in memory otherwise.
        module.register_forward_hook(after, always_call=True)


def _alias(tensor: Tensor) -> Tensor:
    """Return another Parameter over the same data: PEFT may change or replace one, and the other stays."""
    return nn.Parameter(tensor.data, requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor
