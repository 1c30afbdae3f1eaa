"""The logit lens: each block's output at the prompt's last token, through the model's own norm and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lazarus.engine import Conventions, Head
from lazarus.engine.head import MOST_LOGITS, alike
from lazarus.engine.recorder import Recorder, Take
from lazarus.errors import UnsupportedModelError
from lazarus.models import LoadedModel


def read_layers(
    model: LoadedModel, conventions: Conventions, ids: Sequence[int], advanced: Callable[[int], None]
) -> Float[Tensor, "layers vocabulary"]:
    """Next-token logits after each block, on the CPU, in float32 (or float64).

    A block's output at the last token takes the place of the last block's, and all that the model does
    after that is done to it (logit lens, nostalgebraist 2020). The last row must be the model's own logits.
    `advanced` is told of so many layers more.

    Raises:
        UnsupportedModelError: the model predicts no next token, or its last row is not its own logits.
        DeviceError: out of memory, or an operator that the device lacks.
    """
    if conventions.head_reads is None:
        raise UnsupportedModelError(_why_no_logits(model, conventions))
    head, time = Head(model, conventions.head_reads), conventions.axes[1]
    blocks, final = _last_states(model, time, ids)
    own = _plain(head.logits(final))
    rows = []
    for states in torch.split(blocks, _rows_at_once(model, own.shape[-1]), dim=time):
        rows.append(_plain(head.read_sequence(states, time)))
        advanced(states.shape[time])
    logits = torch.cat(rows)
    if not alike(logits[-1:], own, torch.finfo(model.model.dtype).eps):
        raise UnsupportedModelError(
            f"{model.name}: {type(model.model).__name__} makes more than a norm of what leaves its last "
            "block, such as a mixture with what other blocks gave, so a block's output cannot be read by "
            "itself through its head. The logit lens is not defined for it: compare other models."
        )
    return logits


def _why_no_logits(model: LoadedModel, conventions: Conventions) -> str:
    kind = type(model.model).__name__
    advice = "Compare causal language models."
    if model.model.config.is_encoder_decoder:
        return f"{model.name}: {kind} is an encoder-decoder, whose encoder predicts no next token. {advice}"
    if not conventions.causal:
        return f"{model.name}: {kind} lets tokens see those after them: it predicts no next token. {advice}"
    return (
        f"{model.name}: {kind} has no next-token head that can be run by itself, and the logit lens reads "
        f"through it. {advice}"
    )


def _last_states(model: LoadedModel, time: int, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What each block returns for the last token, and the state that the head reads there.

    The first are one behind the other on the axis of time; the second is [1, hidden].
    """

    def last(states: Tensor) -> Tensor:
        if states.shape[time] != len(ids):
            raise UnsupportedModelError(
                f"{model.name}: a prompt of {len(ids)} tokens gave states for {states.shape[time]}: this "
                "architecture adds positions of its own, so tokens cannot be matched. A shorter prompt may "
                "not need them."
            )
        return states.narrow(time, len(ids) - 1, 1).clone()

    input_ids = torch.tensor([ids])
    take = Take(last, lambda states: states[:, len(ids) - 1])
    seen = Recorder(model).run(input_ids, torch.ones_like(input_ids), take)
    assert seen.final is not None
    return torch.cat(seen.blocks, dim=time), seen.final


def _rows_at_once(model: LoadedModel, n_tokens: int) -> int:
    """Layers stand where tokens do, so there can be no more of them than the model's context has."""
    most = max(1, MOST_LOGITS // n_tokens)
    return min(most, model.anatomy.context or most)


def _plain(logits: Tensor) -> Tensor:
    """On the CPU, in float32 at least."""
    there = logits.cpu()
    return there if there.dtype == torch.float64 else there.float()
