"""Both models, from whatever the caller gave: in memory, or read block by block where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lazarus.blame import NoRoomError
from lazarus.errors import DeviceError, ModelError, UsageError
from lazarus.memory import Limit, tightest_limit
from lazarus.messages import option
from lazarus.metrics import COPIES, PENDING_BYTES, logits_bytes
from lazarus.models import (
    Clock,
    Footprint,
    LoadedModel,
    LoadOptions,
    ModelReference,
    StandIn,
    Weights,
    check_paged,
    estimate,
    fits_surely,
    free_bytes,
    kind_of,
    load_base,
    load_beside,
    load_one,
    load_paged,
    load_pair,
    page,
    parse_model,
    stand_in,
    stand_in_pair,
    wrap_model,
)
from lazarus.notes import Notes
from lazarus.options import Options
from lazarus.ranks import Rank

Model = str | Path | nn.Module | ModelReference
Role = Literal["base", "finetuned"]
Announce = Callable[[Role, str], None]

ROOM_FOR_THE_REST = 1.1
"""What runs beside the weights, as a factor of them; and, in bytes, whatever their size:"""
ROOM_AT_LEAST = 2**30
STREAMED_AT_LEAST = 224 * 2**20
"""What streaming takes beside weights, in bytes: tokenizers and what is imported as it runs."""


@dataclass(frozen=True)
class Work:
    """The device that models run on, and how many tokens of a batch are compared."""

    device: torch.device
    n_rows: int = 1
    """the tokens of a batch that are compared, about"""


def load_models(
    models: tuple[Model, Model], chosen: Options, work: Work, announce: Announce, notes: Notes
) -> tuple[LoadedModel, LoadedModel]:
    """Load both models; two that are named are loaded as a pair, so that common weights are held once.

    What a reader must know of them is noted.

    Raises:
        UsageError: models in memory are to be read from disk.
        ModelError: one of them cannot be loaded; the subclass and the message say why.
    """
    options = _load_options(chosen, work.device)
    named = [parse_model(str(m)) if isinstance(m, str | Path) else m for m in models]
    match named:
        case [ModelReference() as first, ModelReference() as second]:
            streams = _streams((first, second), chosen, work, notes)
            load = load_paged if streams else load_pair
            loaded = load(first, second, options, announce)
        case _ if chosen.memory == "stream":
            raise _in_memory_already()
        case _:
            roles: tuple[Role, Role] = ("base", "finetuned")
            one, other = (
                _load_or_wrap(m, role, options, announce) for m, role in zip(named, roles, strict=True)
            )
            loaded = one, other
    for model in loaded:
        notes.extend(model.notes)
    return loaded


class BaseKeeper:
    """Loads one pair after another with the same base, which stays in memory between them.

    It takes the place of `load_models`. A base that the last pair has changed, by an adapter or by another
    kernel of attention, is loaded again.
    """

    def __init__(self) -> None:
        self._weights: Weights | None = None

    def __call__(
        self,
        models: tuple[Model, Model],
        chosen: Options,
        work: Work,
        announce: Announce,
        notes: Notes,
    ) -> tuple[LoadedModel, LoadedModel]:
        """Load a pair as `load_models` does."""
        base, finetuned = (parse_model(str(m)) if isinstance(m, str | Path) else m for m in models)
        if not (isinstance(base, ModelReference) and isinstance(finetuned, ModelReference)) or base.adapters:
            return load_models((base, finetuned), chosen, work, announce, notes)
        options = _load_options(chosen, work.device)
        if self._weights is None:
            if _streams((base, finetuned), chosen, work, Notes()):
                return load_models((base, finetuned), chosen, work, announce, notes)
            announce("base", base.name)
            self._weights = load_base(base, options)
        weights = self._weights
        announce("finetuned", finetuned.name)
        kernel = weights.model.config._attn_implementation
        loaded = load_beside(base, weights, finetuned, options)
        if weights.model.config._attn_implementation != kernel:
            self._weights = None
        for model in loaded:
            notes.extend(model.notes)
        return loaded


def load_alone(
    model: Model, role: Role, chosen: Options, work: Work, announce: Announce, notes: Notes
) -> LoadedModel:
    """Load one model by itself; what a reader must know of it is noted.

    Raises:
        UsageError: a model in memory is to be read from disk.
        ModelError: it cannot be loaded; the subclass and the message say why.
    """

    def once(which: Role, name: str) -> None:
        if which == "base":  # the pair below is of this model twice
            announce(role, name)

    named = parse_model(str(model)) if isinstance(model, str | Path) else model
    options = _load_options(chosen, work.device)
    if isinstance(named, ModelReference):
        if _streams((named, named), chosen, work, notes):
            loaded = load_paged(named, named, options, once)[0]
        else:
            loaded = _load_or_wrap(named, role, options, announce)
    else:
        if chosen.memory == "stream":
            raise _in_memory_already()
        loaded = _load_or_wrap(named, role, options, announce)
    notes.extend(loaded.notes)
    return loaded


def _in_memory_already() -> UsageError:
    return UsageError(
        f"{option('memory', 'stream')} reads models from disk, block by block, and one of these is "
        f"in memory already. Name both by their folders, or use {option('memory', 'resident')}.",
        option="memory",
    )


@dataclass(frozen=True)
class StandIns:
    """Models that stand in for those of a run: two, or one that runs alone."""

    each: tuple[StandIn, ...]
    streams: bool

    @property
    def models(self) -> tuple[LoadedModel, LoadedModel]:
        """Return them as loaded models; one that runs alone twice."""
        return self.each[0].model, self.each[-1].model


def load_stand_ins(
    models: tuple[Model, ...], chosen: Options, work: Work, clock: Clock, *, whole: bool
) -> StandIns:
    """Return models of random weights in the place of those that are named: of a pair, or of one alone.

    With `whole` every block of them runs, and else a few of each kind, by `clock`.

    Raises:
        UsageError: a model is in memory.
        ModelError: one of them cannot be opened, or is built only from its weights.
        DeviceError: there is no room for a few blocks.
    """
    options = replace(_load_options(chosen, work.device), digests=False)
    references = _named(models)
    first, second = references[0], references[-1]
    streams = chosen.memory == "stream"
    if chosen.memory == "auto":
        streams = _must_stream((first, second), chosen, work, Notes())
    if streams:
        check_paged(first, second, options)
    each: tuple[StandIn, ...] = (stand_in(first, options, clock, whole=whole),)
    if len(references) > 1:
        each = stand_in_pair(first, second, options, clock, whole=whole)
    return StandIns(page(each, clock) if streams else each, streams)


def kind_beside(base: Model, member: Model, chosen: Options, device: torch.device) -> tuple[Hashable, int]:
    """Return what is equal for models that take the same beside base, and the bytes of a model's files.

    Raises:
        UsageError: a model is in memory.
        ModelError: it cannot be opened.
    """
    first, second = _named((base, member))
    return kind_of(second, first, _load_options(chosen, device))


def _named(models: Sequence[Model]) -> list[ModelReference]:
    """Return the models of an estimate."""
    named = [parse_model(str(m)) if isinstance(m, str | Path) else m for m in models]
    references = [model for model in named if isinstance(model, ModelReference)]
    if len(references) < len(models):
        raise UsageError("an estimate is of models that are not loaded: give them by their names.")
    return references


def pick_device(name: str, rank: Rank) -> torch.device:
    """The device; `auto` is the first GPU there is, and of several processes each has its own.

    Raises:
        DeviceError: it is not there.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    n_cuda = torch.cuda.device_count()
    if name == "cuda" and rank.world > 1 and n_cuda > 1:
        name = f"cuda:{rank.local % n_cuda}"
    device = torch.device(name)
    absent = device.type == "mps" and not has_mps
    if absent or (device.type == "cuda" and (device.index or 0) >= n_cuda):
        raise DeviceError(
            f"{option('device', name)}: there is no such device here ({n_cuda} CUDA devices). Use "
            f"{option('device', 'cpu')}.",
            option="device",
        )
    return device


def less_memory(dtype: str, device: torch.device, *, can_stream: bool) -> list[str]:
    """Return what makes two models take less memory, as advice; `dtype` is the option's value."""
    found = [option("memory", "stream")] if can_stream else []
    if dtype == "float32" or (dtype == "auto" and device.type == "cpu"):
        found.append(option("dtype", "bfloat16"))
    return found if device.type == "cpu" else [*found, option("device", "cpu")]


def _streams(pair: tuple[ModelReference, ModelReference], chosen: Options, work: Work, notes: Notes) -> bool:
    """Return whether a pair is read block by block, once it is known that there is room for it.

    Raises:
        NoRoomError: a limit of the process leaves too little, and the system would kill it.
    """
    streams = chosen.memory == "stream"
    if chosen.memory == "auto":
        streams = _must_stream(pair, chosen, work, notes)
    limit = tightest_limit()
    if limit is not None and work.device.type == "cpu":
        _check_limit(pair, _load_options(chosen, work.device), streams, limit)
    return streams


def _must_stream(
    pair: tuple[ModelReference, ModelReference], chosen: Options, work: Work, notes: Notes
) -> bool:
    """Return whether a pair is read block by block, and note why: both models do not fit, and can be."""
    free = free_bytes(work.device)
    footprint = _footprint(pair, _load_options(chosen, work.device), free // 2)
    if footprint is None:
        return False
    whole, rows = footprint.resident * ROOM_FOR_THE_REST + ROOM_AT_LEAST, rows_bytes(footprint, chosen, work)
    if whole + rows <= free:
        return False
    # Told only where it is the rows that leave no room.
    beside = f", what is compared of a batch {rows / 1e9:.1f} GB," if whole <= free else ""
    notes.add(
        "streamed",
        f"both models take {footprint.resident / 1e9:.1f} GB{beside} and {free / 1e9:.1f} GB are free, so a "
        f"block of each at a time was read from disk ({option('memory', 'stream')})",
    )
    return True


def rows_bytes(footprint: Footprint, chosen: Options, work: Work) -> int:
    """Return about what is kept of a batch of two models in memory, and takes while it is compared.

    Each model's rows at every site, base's once more for the noise and moved, and those of local changes; a
    site's rows in float64, on a device those of several sites; and the logits.
    """
    n_halves = 2 + (0 if chosen.no_noise_floor else 2) + chosen.localize
    kept = work.n_rows * footprint.row * n_halves // 2
    wide = COPIES * 8 * work.n_rows * footprint.width
    waiting = 0 if work.device.type == "cpu" else min(kept * 8, 2 * PENDING_BYTES)
    logits = logits_bytes(work.n_rows, footprint.logits, work.device, with_noise=not chosen.no_noise_floor)
    return kept + wide + waiting + logits


def _footprint(
    pair: tuple[ModelReference, ModelReference], options: LoadOptions, room: int
) -> Footprint | None:
    """Return what a pair takes; None where it surely fits into so many bytes, or that is not known."""
    try:
        return None if fits_surely(*pair, options, room) else estimate(*pair, options)
    except ModelError:
        return None  # loading says it, in its place


def _check_limit(
    pair: tuple[ModelReference, ModelReference], options: LoadOptions, streams: bool, limit: Limit
) -> None:
    """Refuse a pair that a limit does not hold, by the least that it takes."""
    footprint = _footprint(pair, options, limit.left // 2)
    if footprint is None:
        return
    whole = footprint.resident
    # Both heads are in memory at the end, and before that one block of each that runs and one that is read.
    parts = footprint.rest + 2 * footprint.block + STREAMED_AT_LEAST
    if (parts if streams else whole) <= limit.left:
        return
    told = f"both models take {whole / 1e9:.2f} GB"
    if streams:
        told += f", a block of each at a time {parts / 1e9:.2f} GB"
    helpless = () if parts <= limit.left and not streams else (option("memory", "stream"),)
    raise NoRoomError(f"{told}, and {limit.left / 1e9:.2f} GB are left of {limit}", helpless)


def _load_or_wrap(
    model: nn.Module | ModelReference, role: Role, options: LoadOptions, announce: Announce
) -> LoadedModel:
    if isinstance(model, ModelReference):
        announce(role, model.name)
        return load_one(model, options)
    announce(role, type(model).__name__)
    return wrap_model(model, type(model).__name__, options.layers_path)


def _load_options(options: Options, device: torch.device) -> LoadOptions:
    if options.dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else None
    else:
        dtype = getattr(torch, options.dtype)
    return LoadOptions(
        dtype,
        device,
        options.trust_remote_code,
        options.layers_path,
        options.dequantize,
        digests=not options.no_digests,
    )
