"""Models that stand in for checkpoints whose weights are not read: random, with a few blocks of each kind.

A stand-in has every module, and the memory of a few blocks: the others of a kind hold the same tensors. So a
run goes through it as through the model, and only a few of its blocks run (skipping.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazarus import _transformers
from lazarus.errors import DeviceError, UnsupportedModelError
from lazarus.models.adapters import share_storage
from lazarus.models.anatomy import dissect
from lazarus.models.checkpoint import Conversion, build_empty
from lazarus.models.design import same_config
from lazarus.models.faults import translated
from lazarus.models.gguf.header import StoredArray
from lazarus.models.gguf.tensors import stored_dtype
from lazarus.models.kinds import bytes_of_adapters, file_bytes
from lazarus.models.layout import places_of
from lazarus.models.load import Weights, build, check_report, finish, same_attention
from lazarus.models.loaded import LoadedModel
from lazarus.models.opening import LoadOptions, Opened, open_to_load, stored_weights
from lazarus.models.reference import ModelReference, Source, adapter_base
from lazarus.models.room import free_bytes
from lazarus.models.skipping import Clock, skip_blocks
from lazarus.models.stored import StoredTensor
from lazarus.models.underneath import adapter_of, source_under
from lazarus.notes import Notes

N_RUN, N_RUN_LARGE, LARGE_BYTES = 3, 2, 2**28
"""how many blocks of a kind run: fewer where they are large"""
SAMPLE_BYTES = 2**25
"""how much of a checkpoint is read to see how fast that goes"""
_PATTERN = 2**18
"""random elements that are drawn; larger tensors repeat them"""


@dataclass(frozen=True)
class Size:
    """The size of a checkpoint, by its headers and its configuration."""

    whole: int
    """its weights in memory, in the dtype in which they run"""
    blocks: tuple[int, ...]
    """those of each block"""
    files: int
    """its weights as stored"""

    @property
    def rest(self) -> int:
        """Return what is not in blocks."""
        return self.whole - sum(self.blocks)


@dataclass(frozen=True)
class StandIn:
    """A model that stands in for one that is not loaded."""

    model: LoadedModel
    size: Size
    """that of the checkpoint; nothing for a second model over the same files"""
    held: int
    """what the stand-in itself holds in memory"""
    opening_seconds: float
    """the seconds that loading took here, without reading weights"""
    seconds_a_byte: float
    """the seconds that reading a stored byte takes here, and making elements of it"""
    is_over: bool = False
    """whether it loads over the other model, of one design"""
    adapter_bytes: int = 0

    @property
    def loading_seconds(self) -> float:
        """Return the seconds that loading the model takes."""
        return self.opening_seconds + self.size.files * self.seconds_a_byte


def stand_in_pair(
    base: ModelReference, finetuned: ModelReference, options: LoadOptions, clock: Clock, *, whole: bool
) -> tuple[StandIn, StandIn]:
    """Return models that stand in for a pair; where both stand on the same files, these count once.

    With `whole` every block runs. Tensors that two checkpoints hold alike are not known, and none are taken
    to be so.

    Raises:
        UnsupportedModelError: a model can be built only from its weights.
        DeviceError: there is no room for a few blocks.
        ModelError: one of them cannot be opened; the subclass and the message say why.
    """
    base_source = base.model or adapter_base(adapter_of(base))
    ours = _Begun.of(base_source, options)
    finetuned_source = source_under(finetuned, base)
    if finetuned_source.place == base_source.place:
        theirs = ours.again(finetuned_source)
    else:
        theirs = _Begun.of(finetuned_source, options, ours)
    same_attention(ours.weights.model, theirs.weights.model, ours.weights.notes)
    return ours.finish(base, options, clock, whole), theirs.finish(finetuned, options, clock, whole)


def stand_in(reference: ModelReference, options: LoadOptions, clock: Clock, *, whole: bool) -> StandIn:
    """Return a model that stands in for one by itself.

    Raises:
        ModelError, DeviceError: as of a pair.
    """
    source = reference.model or adapter_base(adapter_of(reference))
    return _Begun.of(source, options).finish(reference, options, clock, whole)


@dataclass
class _Begun:
    """A stand-in before its adapters are on."""

    weights: Weights
    size: Size
    held: int
    seconds: float
    seconds_a_byte: float
    is_over: bool = False

    @classmethod
    def of(cls, source: Source, options: LoadOptions, base: _Begun | None = None) -> _Begun:
        """Open a checkpoint; one of base's design takes base's tensors, but for some that differ."""
        started = time.perf_counter()
        opened = open_to_load(source, options)
        with translated(source.name):
            model, conversion = _build(opened, options)
            report = conversion.finish(model, conversion.check(model))
        model.eval().requires_grad_(requires_grad=False)
        weights = Weights(opened, model, report)
        check_report(weights, options)
        blocks = dissect(model, options.layers_path).blocks
        size = _size(opened, model, blocks)
        is_over, held = base is not None and _is_alike(base.weights, weights), 0
        if is_over and base is not None:
            weights.model = _differing(share_storage(base.weights.model), options)
        seconds = time.perf_counter() - started
        if not is_over:
            held = _fill(model, blocks, options.device)
        return cls(weights, size, held, seconds, _seconds_a_byte(opened, model.dtype), is_over)

    def again(self, source: Source) -> _Begun:
        """Return a second model on the same files."""
        started = time.perf_counter()
        model = share_storage(self.weights.model)
        opened = replace(self.weights.opened, source=source)
        weights = Weights(opened, model, self.weights.report, Notes(self.weights.notes))
        nothing = Size(0, (0,) * len(self.size.blocks), 0)
        return _Begun(weights, nothing, 0, time.perf_counter() - started, 0.0, is_over=True)

    def finish(self, reference: ModelReference, options: LoadOptions, clock: Clock, whole: bool) -> StandIn:
        """Put the adapters on, and let few blocks run."""
        started = time.perf_counter()
        loaded = finish(reference, self.weights, options)
        if not whole:
            skip_blocks(loaded.anatomy.blocks, clock, _n_run(_largest(loaded.anatomy.blocks)))
        seconds = self.seconds + time.perf_counter() - started
        return StandIn(
            model=loaded,
            size=self.size,
            held=self.held,
            opening_seconds=seconds,
            seconds_a_byte=self.seconds_a_byte,
            is_over=self.is_over,
            adapter_bytes=bytes_of_adapters(reference),
        )


def _build(opened: Opened, options: LoadOptions) -> tuple[PreTrainedModel, Conversion]:
    """Build a checkpoint's model empty."""
    kind = _transformers.registered_class(opened.model_class, opened.config)
    why = None
    if opened.quantised:
        why = "its weights are quantised and run as they are stored"
    elif kind is None:
        why = "its Python code is its own"
    if why is not None or kind is None:
        raise UnsupportedModelError(
            f"{opened.source.name}: what it takes cannot be estimated without its weights: {why}. Run it on "
            "a few prompts instead."
        )
    if opened.gguf is None:
        return build(opened, kind, options)
    dtype = options.dtype or stored_dtype(opened.gguf.file)
    model = build_empty(kind, copy.deepcopy(opened.config), [], dtype)
    # A file of llama.cpp has other names; all that matters is that every parameter is there.
    own = {name: StoredTensor("", "F32", tuple(t.shape), 0, 0) for name, t in model.state_dict().items()}
    return model, Conversion(model, own, options.device)


def _is_alike(base: Weights, other: Weights) -> bool:
    """Return whether the second of two models loads over the first one."""
    one, two = base.opened, other.opened
    return (
        one.gguf is None
        and two.gguf is None
        and type(base.model) is type(other.model)
        and same_config(one.config, two.config)
        and base.model.dtype == other.model.dtype
    )


def _size(opened: Opened, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Size:
    return Size(n_bytes(model), tuple(n_bytes(block) for block in blocks), file_bytes(opened))


def n_bytes(module: nn.Module) -> int:
    """Return the size of a module's parameters, each once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _n_run(block: int) -> int:
    return N_RUN if block < LARGE_BYTES else N_RUN_LARGE


def _largest(blocks: Sequence[nn.Module]) -> int:
    return max(n_bytes(block) for block in blocks)


# --- random elements ----------------------------------------------------------------------------


def _fill(model: PreTrainedModel, blocks: Sequence[nn.Module], device: torch.device) -> int:
    """Fill an empty model, blocks of one kind with the same tensors but for the first few; returns the size.

    Raises:
        DeviceError: there is no room for it.
    """
    plan = _Plan(blocks)
    state = model.state_dict(keep_vars=True)
    places = places_of(model)
    wanted: dict[Any, Tensor] = {}
    keys: dict[str, Any] = {}
    for name, tensor in state.items():
        if tensor.is_meta:
            keys[name] = plan.keys.get(id(tensor), id(tensor))
            wanted.setdefault(keys[name], tensor)
    size = sum(tensor.nbytes for tensor in wanted.values())
    if size > (free := free_bytes(device)):
        raise DeviceError(
            f"{model.name_or_path}: an estimate runs a few blocks of random weights, which take "
            f"{size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free."
        )
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(_PATTERN, generator=generator)
    made = {key: _random(tensor, pattern, device) for key, tensor in wanted.items()}
    for name, key in keys.items():
        filled = nn.Parameter(made[key], requires_grad=False) if _is_float(made[key]) else made[key]
        for module, attribute in places[name]:
            setattr(module, attribute, filled)
    return size


class _Plan:
    """The tensors of blocks that are one: those of the same name in blocks of the same shapes."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.keys: dict[int, Any] = {}
        counts: dict[Any, int] = {}
        for block in dict.fromkeys(blocks):
            named = dict(block.named_parameters())
            kind = tuple((name, tuple(t.shape), t.dtype) for name, t in named.items())
            place = counts[kind] = counts.get(kind, -1) + 1
            n_run = _n_run(n_bytes(block))
            for name, tensor in named.items():
                self.keys.setdefault(id(tensor), (kind, name, min(place, n_run - 1)))


def _random(tensor: Tensor, pattern: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of this shape and dtype; a matrix of usual weights, a vector of about 1."""
    if not _is_float(tensor):
        return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)  # some divide by what they hold
    values = 1 + 0.1 * pattern if tensor.dim() < 2 else pattern / tensor.shape[-1] ** 0.5
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    flat, values = made.view(-1), values.to(made)
    for start in range(0, len(flat), len(values)):
        part = flat[start : start + len(values)]
        part.copy_(values[: len(part)])
    return made


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _differing(model: PreTrainedModel, options: LoadOptions) -> PreTrainedModel:
    """Give each block, and the model, a smallest tensor of its own: no block is that of the other model."""
    for module in (*dissect(model, options.layers_path).blocks, model):
        name, parameter = min(module.named_parameters(), key=lambda item: item[1].numel())
        owner, _, attribute = name.rpartition(".")
        other = nn.Parameter(parameter.data * 1.01, requires_grad=False)
        setattr(module.get_submodule(owner), attribute, other)
    return model


# --- reading ------------------------------------------------------------------------------------


def _seconds_a_byte(opened: Opened, dtype: torch.dtype) -> float:
    """Read a few tensors, and make elements of the dtype of the run of them."""
    n_read, kept, started = 0, list[Tensor](), time.perf_counter()
    with translated(opened.source.name):
        for size, read in _readers(opened):
            # Kept, as a model keeps them: memory that is new to the process takes time.
            kept.append(read().to(dtype))
            n_read += size
            if n_read >= SAMPLE_BYTES:
                break
    return (time.perf_counter() - started) / max(1, n_read)


def _readers(opened: Opened) -> Iterator[tuple[int, Callable[[], Tensor]]]:
    """Yield the sizes of tensors, and what reads them: the largest first of those that fit a sample."""
    found: list[tuple[int, Callable[[], Tensor]]]
    if opened.gguf is not None:
        found = [(each.n_bytes, partial(_elements, each)) for each in opened.gguf.file.tensors.values()]
    else:
        found = [(each.n_bytes, each.read) for each in stored_weights(opened).values()]
    fitting = [item for item in found if item[0] <= SAMPLE_BYTES]
    yield from sorted(fitting or found, key=itemgetter(0), reverse=bool(fitting))


def _elements(array: StoredArray) -> Tensor:
    # A copy, because torch warns of an array that cannot be written to, such as a mapped one.
    return torch.from_numpy(np.array(array.elements()))
