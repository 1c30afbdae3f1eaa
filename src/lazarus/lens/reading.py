"""The logit lens: each block's output at the last token, through the model's own norm and LM head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lazarus.engine import Conventions, Head
from lazarus.engine.head import NO_HEAD, alike, reads_blocks, run_with_head
from lazarus.engine.recorder import Recorder, Recording, RowSelection
from lazarus.errors import UnsupportedModelError
from lazarus.metrics import MOST_LOGITS
from lazarus.models import LoadedModel
from lazarus.notes import Notes


def read_layers(
    model: LoadedModel,
    conventions: Conventions,
    ids: Sequence[int],
    advanced: Callable[[int], None],
    notes: Notes,
) -> Float[Tensor, "layers vocabulary"]:
    """Return what the model would say if it stopped after each block (logit lens, nostalgebraist 2020).

    These are next-token logits, on the CPU, in float32 (or float64).

    A block's output at the last token takes the place of the last block's, and all that the model does
    after that is done to it; the last row must then be the model's own logits. Where it is not, because the
    end mixes in what earlier blocks gave, the model itself is cut after each block and run.
    `advanced` is told of so many layers more.

    Raises:
        UnsupportedModelError: the model predicts no next token, or it can be read in neither way.
        DeviceError: out of memory, or an operator that the device lacks.
    """
    head, time = Head(model, check_head(model, conventions)), conventions.axes[1]
    seen = _last_states(model, time, ids)
    own = _own_logits(head, seen)
    rows: list[Tensor] = []
    # The last layers first: they tell whether the others can be read in this way at all.
    for read in _read_backwards(model, head, torch.cat(seen.blocks, dim=time), time):
        rows.insert(0, read)
        if len(rows) == 1:
            same = _reads_last_block(model, ids, read[-1:], own)
            if not same:
                _note_cut(model, notes, is_known=same is not None)
                return _read_cut(model, head, (time, ids), advanced)
        advanced(len(read))
    found = torch.cat(rows)
    found[-1:] = own  # what is read from the last block differs from the model's own logits by rounding
    return found


@dataclass(frozen=True)
class RecordedToken:
    """The states of one token as a recording has them, each [1, width]; None where it has none."""

    blocks: Sequence[Tensor | None]
    final_norm: Tensor | None
    logits: Tensor | None


def read_recorded(
    model: LoadedModel,
    conventions: Conventions,
    ids: Sequence[int],
    token: RecordedToken,
    advanced: Callable[[int], None],
) -> Float[Tensor, "layers vocabulary"]:
    """Return what a live model's norm and LM head read from recorded states, as `read_layers` does.

    The last row is the recorded logits or, without these, what the head reads from the recorded state after
    the final norm.
    A layer of which there are no states has logits that are NaN.

    Raises:
        UnsupportedModelError: the model predicts no next token, or its end reads more than its last block.
        DeviceError: out of memory, or an operator that the device lacks.
    """
    head, time = Head(model, check_head(model, conventions)), conventions.axes[1]
    # The live model's own states tell in which axes its end takes a state, and what it reads.
    seen = _last_states(model, time, ids)
    own, like = _own_logits(head, seen), seen.blocks[-1]
    if not _reads_last_block(model, ids, _plain(head.read_sequence(like, time)), own):
        raise UnsupportedModelError(
            f"{model.name}: the end of {type(model.model).__name__} reads more than the last block, or that "
            "could not be seen, so recorded states cannot be read through it. Name the model that was "
            "recorded, and both are read live."
        )
    absent = [layer for layer, rows in enumerate(token.blocks) if rows is None]
    found = own.new_full((len(token.blocks), own.shape[1]), torch.nan)
    if len(absent) < len(token.blocks):
        # The live model's state stands for one that is absent: a product of fewer rows may round otherwise.
        shaped = [like if rows is None else _shaped(rows, like, conventions) for rows in token.blocks]
        read = list(_read_backwards(model, head, torch.cat(shaped, dim=time), time))
        found = torch.cat(read[::-1])
        found[absent] = torch.nan
    if token.logits is not None and token.logits.shape == own.shape:
        found[-1:] = _plain(token.logits)
    elif token.final_norm is not None:
        assert seen.final is not None
        found[-1:] = _plain(head.logits(token.final_norm.to(seen.final)))
    advanced(len(found))
    return found


def _shaped(rows: Float[Tensor, "1 width"], like: Tensor, conventions: Conventions) -> Tensor:
    """Return a recorded state in the axes and the dtype of one that the block returned."""
    states = torch.empty_like(like)
    view = conventions.rows_view(states)
    view[0, 0] = rows[0].to(view).view(view.shape[2:])
    return states


def _read_backwards(
    model: LoadedModel, head: Head, blocks: Tensor, time: int
) -> Iterator[Float[Tensor, "some vocabulary"]]:
    """Yield what the LM head reads from the states of many layers, some at a time, the last ones first.

    Layers take the places of tokens, so that one call reads many of them.
    """
    for states in reversed(torch.split(blocks, _rows_at_once(model, head.n_tokens), dim=time)):
        yield _plain(head.read_sequence(states, time))


def check_head(model: LoadedModel, conventions: Conventions) -> type[ModelOutput]:
    """Return what the LM head of a model reads.

    Raises:
        UnsupportedModelError: the model predicts no next token.
    """
    if conventions.head_reads is None:
        raise UnsupportedModelError(_why_no_logits(model, conventions))
    return conventions.head_reads


def _reads_last_block(model: LoadedModel, ids: Sequence[int], read: Tensor, own: Tensor) -> bool | None:
    """Return whether the end reads the last block alone: what is read from it must be the own logits.

    Where these are not finite, it is tried with random hidden states in its place. None if not known.
    """
    same = alike(read, own, torch.finfo(model.model.dtype).eps)
    if same is not None:
        return same
    recorder, input_ids = Recorder(model), torch.tensor([list(ids)])
    batch = (input_ids, torch.ones_like(input_ids))
    whole = run_with_head(recorder, *batch)
    return None if whole is None else reads_blocks(recorder, batch, whole)


def _note_cut(model: LoadedModel, notes: Notes, *, is_known: bool) -> None:
    reason = (
        "its end reads earlier blocks too"
        if is_known
        else "its own logits are not finite, so whether its end reads earlier blocks too could not be seen"
    )
    told = f"{model.name}: {reason}: each layer is the model cut after that block"
    notes.add("lens-by-cutting", told, model=model.name)


def _read_cut(
    model: LoadedModel, head: Head, text: tuple[int, Sequence[int]], advanced: Callable[[int], None]
) -> Float[Tensor, "layers vocabulary"]:
    """The logits of the model without the blocks after each one: as many passes as it has blocks.

    `text` is the axis of the tokens in a block's hidden states, and their ids.
    """
    (time, ids), rows, blocks = text, list[Tensor](), model.anatomy.blocks
    for n_kept in range(1, len(blocks) + 1):
        with _cut(model, n_kept):
            seen = _last_states(model, time, ids)
        if seen.order != list(range(n_kept)):
            raise UnsupportedModelError(
                f"{model.name}: {type(model.model).__name__} mixes what leaves its last block with what "
                "other blocks gave, and cannot be cut after a block: they do not run once each, in order. "
                "The logit lens is not defined for it: compare other models."
            )
        rows.append(_own_logits(head, seen))
        advanced(1)
    return torch.cat(rows)


@contextmanager
def _cut(model: LoadedModel, n_kept: int) -> Iterator[None]:
    """Leave the model its first blocks alone while the context lasts."""
    blocks = model.anatomy.blocks
    places = [
        (parent, name, child)
        for parent in model.model.modules()
        for name, child in parent.named_children()
        # a module equals only itself: this is the list of these very blocks
        if isinstance(child, nn.ModuleList) and tuple(child) == blocks
    ]
    for parent, name, _ in places:
        setattr(parent, name, nn.ModuleList(blocks[:n_kept]))
    try:
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _why_no_logits(model: LoadedModel, conventions: Conventions) -> str:
    kind = type(model.model).__name__
    advice = "Compare causal language models."
    if model.model.config.is_encoder_decoder:
        return f"{model.name}: {kind} is an encoder-decoder, whose encoder predicts no next token. {advice}"
    if not conventions.causal:
        return f"{model.name}: {kind} lets tokens see those after them: it predicts no next token. {advice}"
    if conventions.why_no_head != NO_HEAD:
        return f"{model.name}: {conventions.why_no_head}, and the logit lens reads through it."
    return f"{model.name}: {kind} has {NO_HEAD}, and the logit lens reads through it. {advice}"


def _last_states(model: LoadedModel, time: int, ids: Sequence[int]) -> Recording:
    """Return each block's output for the last token, and the state [1, hidden] that the LM head reads."""

    def last(states: Tensor) -> Tensor:
        if states.shape[time] != len(ids):
            raise UnsupportedModelError(
                f"{model.name}: a prompt of {len(ids)} tokens gave states for {states.shape[time]}: this "
                "architecture adds positions of its own, so tokens cannot be matched. A shorter prompt may "
                "not need them."
            )
        # A view would keep the hidden states of all tokens in memory.
        return states.narrow(time, len(ids) - 1, 1).clone()

    input_ids = torch.tensor([ids])
    take = RowSelection(last, lambda states: states[:, len(ids) - 1])
    return Recorder(model).run(input_ids, torch.ones_like(input_ids), take)


def _own_logits(head: Head, seen: Recording) -> Tensor:
    assert seen.final is not None
    return _plain(head.logits(seen.final))


def _rows_at_once(model: LoadedModel, n_tokens: int) -> int:
    """Return how many layers are read at once: they stand where tokens do, so the context is the limit."""
    most = max(1, MOST_LOGITS // n_tokens)
    return min(most, model.anatomy.context or most)


def _plain(logits: Tensor) -> Tensor:
    """Return a tensor on the CPU, in float32 or a wider dtype."""
    there = logits.cpu()
    return there if there.dtype == torch.float64 else there.float()
