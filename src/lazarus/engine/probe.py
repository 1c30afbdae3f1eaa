"""One short pass that learns how a model's blocks behave, and checks it against a pass alone.

It replaces a list of families: whether the model is causal, where the batch and the tokens are in a
block's states, how often each block runs, and whether padding leaves the other tokens alone are
properties of the model in hand, and twenty tokens are enough to see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lazarus.batches import Padding
from lazarus.engine.finite import find_break
from lazarus.engine.forms import Components
from lazarus.engine.head import (
    NO_HEAD,
    HeadCheck,
    WholePass,
    head_alone,
    reads_blocks,
    run_with_head,
)
from lazarus.engine.recorder import Recorder, Recording, RowSelection, first_tensor
from lazarus.engine.replay import Call, can_replay, recording, stopping_after
from lazarus.engine.score_heads import NO_LABELS, LabelCheck, check_labels
from lazarus.errors import BlocksNotFoundError, NoDataError
from lazarus.messages import option
from lazarus.metrics import to_float64
from lazarus.models import LoadedModel, block_settings
from lazarus.notes import Note, Notes

# ROWS and LENGTH tell the axes of a block's states apart, so they are sizes that few other axes have.
LENGTH = 7
SHORT = 4
ROWS = 3
TEXTS = 4
"""The number of texts of seven tokens that are tried at most, where no state is finite."""


@dataclass(frozen=True)
class Conventions:
    """The behaviour of a model's blocks."""

    n_layers: int
    width: int
    axes: tuple[int, int]
    """where batch and time are in a block's states; all other axes are features"""
    causal: bool
    padding: Padding
    """the batching under which a prompt's states do not depend on its neighbours"""
    has_final_norm: bool
    head_reads: type[ModelOutput] | None
    """what the stack hands to a causal model's LM head; None where the head cannot be run by itself"""
    why_no_head: str = NO_HEAD
    """why it cannot be"""
    labels: LabelCheck = NO_LABELS
    """how the scores of its labels are made, where it has any"""
    padding_is_known: bool = True
    """False where too few states were finite to see what padding does"""
    notes: tuple[Note, ...] = ()
    components: Components | None = None
    """the sublayers of each block, where they are compared (`learn_components`)"""

    def by_token(self, tensor: Tensor, n_tokens: int) -> Float[Tensor, "batch time width"]:
        """A tensor inside a block with batch and time in front; there the rows of all may be in one axis."""
        return tensor.view(-1, n_tokens, tensor.shape[1]) if tensor.dim() == 2 else self.rows(tensor)

    def rows_view(self, states: Tensor) -> Float[Tensor, "batch time *features"]:
        """A block's states with batch and time in front: the same memory, so that it can be written to."""
        return states.movedim(self.axes, (0, 1))

    def rows(self, states: Tensor) -> Float[Tensor, "batch time hidden"]:
        """A block's states with batch and time in front and all features in one axis."""
        return _arranged(states, self.axes)


def learn(model: LoadedModel, ids: Sequence[int], pad_id: int) -> Conventions:
    """Run a few tokens of a real prompt and see.

    Three rows of seven tokens: a text, the same with another last token, and its last four, padded.
    Then those four alone. States that are not finite say nothing: where all are such, other tokens are run.

    Raises:
        BlocksNotFoundError: a block does not run, or its states have no place for each token.
        NoDataError: not one state is finite, on any of these texts.
        UnsupportedModelError: the model's forward pass fails on token ids alone.
    """
    recorder = Recorder(model)
    for text in _texts(model, ids):
        probe = _run_probe(recorder, _probe_batch(text, pad_id))
        if probe.causal is not None:
            break
    else:
        # No text gave a finite state.
        broken = find_break(model, ids[:LENGTH], probe.axes[1])
        raise NoDataError(
            f"{model.name}: not one of its hidden states is finite, so there is nothing to compare. "
            f"{broken.told(model) + '.' if broken else ''}".strip()
        )
    padding = _find_padding(recorder, probe)
    head = HeadCheck(None)
    if probe.causal and probe.whole is not None:
        head = head_alone(recorder, probe.batch, probe.whole)
    labels = check_labels(recorder, probe.batch, padding or "one_by_one", probe.output)
    assert probe.seen.final is not None
    return Conventions(
        n_layers=len(probe.blocks),
        width=probe.blocks[0].shape[-1],
        axes=probe.axes,
        causal=probe.causal,
        padding=padding or "one_by_one",
        has_final_norm=_has_final_norm(probe.blocks[-1], probe.seen.final),
        head_reads=head.reads,
        why_no_head=head.why_not,
        labels=labels,
        padding_is_known=padding is not None,
        notes=_notes(model, probe.seen),
    )


@dataclass(frozen=True)
class _Probe:
    """The findings of one short text."""

    batch: tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]
    """its token ids and their mask"""
    whole: WholePass | None
    """the pass with the LM head, where there is one"""
    seen: Recording
    output: Any
    """what the stack returned of it"""
    axes: tuple[int, int]
    blocks: list[Tensor]
    """the states after each block, batch and time in front"""
    causal: bool | None
    """None where no state was finite"""


def _run_probe(recorder: Recorder, batch: tuple[Tensor, Tensor]) -> _Probe:
    model = recorder.model
    whole = run_with_head(recorder, *batch)
    # A run calls the stack by itself: only where the head sits right on it is this pass the same.
    is_plain = model.anatomy.stack is model.model.base_model
    outputs = list[Any]() if whole is None else [whole.stack_output]
    seen = whole.recording if whole is not None and is_plain else _whole(recorder, *batch, outputs.append)
    _check_calls(model, seen)
    axes = _find_axes(model, seen)
    blocks = [_arranged(states, axes) for states in seen.blocks]
    # The two rows differ in their last token alone: earlier states move only if a block looks ahead.
    told = [_alike(b[0, :-1], b[1, :-1], _same_pass_limit(b)) for b in blocks]
    causal = None if set(told) == {None} else False not in told
    return _Probe(batch, whole, seen, outputs[-1], axes, blocks, causal)


def _texts(model: LoadedModel, ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """The tokens given, the next few of them, and then some from all over the vocabulary."""
    yield ids
    yield from (ids[start:] for start in range(LENGTH, min(len(ids), TEXTS * LENGTH), LENGTH))
    n_tokens = getattr(model.model.get_input_embeddings(), "num_embeddings", None)
    if n_tokens:
        yield [n_tokens * (2 * i + 1) // (2 * LENGTH) for i in range(LENGTH)]


def head_reads_blocks(model: LoadedModel, ids: Sequence[int], pad_id: int) -> bool | None:
    """Return whether this causal model's LM head can be run on what leaves a block, through the final norm.

    None where that is not known, because its logits are not finite.
    """
    recorder, batch = Recorder(model), _probe_batch(ids, pad_id)
    whole = run_with_head(recorder, *batch)
    return False if whole is None else reads_blocks(recorder, batch, whole)


def passes_go_on(model: LoadedModel, ids: Sequence[int], pad_id: int, counts: Sequence[int]) -> bool:
    """Try whether a pass goes on after the first n blocks, for each n of `counts`, without them."""
    recorder = Recorder(model)
    input_ids, mask = _probe_batch(ids, pad_id)

    def run() -> Tensor:
        last = recorder.run(input_ids, mask, RowSelection(torch.Tensor.detach, torch.Tensor.clone)).final
        assert last is not None
        return last

    return can_replay(model.anatomy.blocks, run, counts)


def _probe_batch(ids: Sequence[int], pad_id: int) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    text = torch.tensor([ids[i % len(ids)] for i in range(LENGTH)])
    input_ids = text.repeat(ROWS, 1)
    others = [i for i in ids if i != int(text[-1])]
    input_ids[1, -1] = others[0] if others else abs(int(text[-1]) - 1)  # any other token
    input_ids[2, :SHORT] = text[-SHORT:]
    input_ids[2, SHORT:] = pad_id
    mask = torch.ones_like(input_ids)
    mask[2, SHORT:] = 0
    return input_ids, mask


def _whole(
    recorder: Recorder, input_ids: Tensor, mask: Tensor, take: Callable[[Any], None] | None = None
) -> Recording:
    return recorder.run(input_ids, mask, RowSelection(torch.Tensor.detach, torch.Tensor.detach, take))


def _check_calls(model: LoadedModel, seen: Recording) -> None:
    silent = set(range(len(model.anatomy.blocks))) - set(seen.order)
    if silent:
        raise BlocksNotFoundError(
            f"{model.name}: block {min(silent)} of {len(model.anatomy.blocks)} did not run. These are "
            f"not the model's blocks: name them with {option('layers_path')}.",
            option="layers_path",
        )
    if seen.embedding is None or {s.shape for s in seen.blocks} != {seen.embedding.shape}:
        shapes = sorted({tuple(s.shape) for s in seen.blocks})
        raise BlocksNotFoundError(
            f"{model.name}: what enters and what leaves its blocks do not have one shape ({shapes}), "
            f"so they carry no common residual stream. Name other blocks with {option('layers_path')}.",
            option="layers_path",
        )


def _find_axes(model: LoadedModel, seen: Recording) -> tuple[int, int]:
    """Batch and time, by their sizes."""
    shape = seen.blocks[0].shape
    if ROWS not in shape[:-1] or LENGTH not in shape[:-1]:
        raise BlocksNotFoundError(
            f"{model.name}: {ROWS} prompts of {LENGTH} tokens give block states of shape "
            f"{tuple(shape)}, which have no place for each token. It cannot be compared by token."
        )
    return shape.index(ROWS), shape.index(LENGTH)


def _arranged(states: Tensor, axes: tuple[int, int]) -> Tensor:
    return states.movedim(axes, (0, 1)).flatten(2)


def _alike(one: Tensor, other: Tensor, limit: float) -> bool | None:
    """Return whether no row differs by more than `limit` of its norm; None where no row is finite in both."""
    a, b = to_float64(one), to_float64(other)
    told = _finite(a) & _finite(b)
    if not told.any():
        return None
    return bool(((a - b).norm(dim=-1) <= limit * b.norm(dim=-1))[told].all())


def _finite(states: Tensor) -> Tensor:
    """Return which rows are finite."""
    return states.isfinite().all(-1)


def _has_final_norm(last: Tensor, final: Tensor) -> bool:
    """Return whether something is done to what leaves the last block.

    Where no element is finite, their place in memory tells: left alone, it is one tensor.
    """
    if last.shape != final.shape or last.dtype != final.dtype:
        return True
    told = last.isfinite() | final.isfinite()
    return not torch.equal(last[told], final[told]) if told.any() else last.data_ptr() != final.data_ptr()


def _same_pass_limit(states: Tensor) -> float:
    """Return the limit between rows of one pass: the kernels are the same, and so is nearly every bit."""
    return max(1e-4, 4 * torch.finfo(states.dtype).eps)


def _other_pass_limit(states: Tensor) -> float:
    """Return the limit between passes of two shapes: far above what other kernels do, far below a fault."""
    return max(1e-3, 32 * torch.finfo(states.dtype).eps)


def _find_padding(recorder: Recorder, probe: _Probe) -> Padding | None:
    """Return whether a prompt's states in a padded batch are those it has alone: after a block of each kind.

    None where that cannot be seen, because states are not finite.
    """
    input_ids, mask = probe.batch
    last = _last_of_new_kind(recorder.model.anatomy.blocks)
    alone = _beginning(recorder, input_ids[2:, :SHORT], mask[2:, :SHORT], last)
    single = [_arranged(states, probe.axes)[0] for states in alone]
    limit = _other_pass_limit(probe.blocks[0])
    # `_beginning` ends with `last`, so it may have seen fewer blocks than the probe.
    right = _kept([b[2, :SHORT] for b in probe.blocks[: len(single)]], single, limit)
    if right is not False:
        return "right" if right else None
    # Is it the padding, or any company at all? Now with another prompt of the same length.
    pair = _beginning(recorder, input_ids[[0, 2], :SHORT], mask[[0, 2], :SHORT], last)
    together = _kept([_arranged(states, probe.axes)[1] for states in pair], single, limit)
    return "equal_lengths" if together else "one_by_one"


def _kept(batched: Sequence[Tensor], alone: Sequence[Tensor], limit: float) -> bool | None:
    """Return whether the states in a batch are those alone, at every block; None where a block says nothing.

    A row that is finite alone and not in the batch counts as another.
    """
    told = [_alike(b, a, limit) for b, a in zip(batched, alone, strict=True)]
    lost = any(bool((_finite(a) & ~_finite(b)).any()) for b, a in zip(batched, alone, strict=True))
    return False if lost or False in told else None if None in told else True


def _beginning(recorder: Recorder, input_ids: Tensor, mask: Tensor, last: nn.Module) -> list[Tensor]:
    """The states after each block of a pass that ends with `last`."""
    calls: list[Call] = []
    # Hooks run in the order in which they were put on: the last block is recorded, then the pass ends.
    with recording(recorder.model.anatomy.blocks, calls.append), stopping_after(last):
        _whole(recorder, input_ids, mask)
    return [first_tensor(call.output) for call in calls]


def _last_of_new_kind(blocks: Sequence[nn.Module]) -> nn.Module:
    """The first block after which only blocks like earlier ones follow: the same modules and settings."""
    kinds = [
        [block_settings(module, index) for module in block.modules()] for index, block in enumerate(blocks)
    ]
    return blocks[max(kinds.index(kind) for kind in kinds)]


def _notes(model: LoadedModel, seen: Recording) -> tuple[Note, ...]:
    notes = Notes()
    if seen.order != list(range(len(model.anatomy.blocks))):
        notes.add(
            "repeated-blocks",
            f"{model.name}: blocks run more than once ({len(model.anatomy.blocks)} blocks, "
            f"{len(seen.order)} calls); layer i is the i-th call",
            model=model.name,
        )
    if seen.blocks[0].dim() > 3:
        notes.add(
            "parallel-streams",
            f"{model.name}: its residual stream has several parallel streams; a layer's state is all "
            "of them, one after the other",
            model=model.name,
        )
    return tuple(notes)
