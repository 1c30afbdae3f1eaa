"""The tensors of a model that a comparison of its hidden states and next tokens can see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from lazarus.engine.head import Head
from lazarus.engine.score_heads import LabelHead, ScoreHead, modules_run
from lazarus.models import Compared, LoadedModel


@dataclass(frozen=True)
class Coverage:
    """The tensors of one model that a comparison can see."""

    compared: Compared
    n_logits: int | None
    """for how many tokens its LM head has logits; None where the head was not run"""


def find_coverage(
    model: LoadedModel, head_reads: type[ModelOutput] | None, scores: ScoreHead | None = None
) -> Coverage:
    """Return what of a model is compared: its text stack, and what makes logits or scores of its states.

    `head_reads` is what the stack hands to the LM head (`Conventions`); None where no logits are compared.
    `scores` makes scores or embeddings where these are. A pooler inside the stack only reads the last hidden
    states, so nothing that is compared depends on it but the scores of a head that reads it.

    Raises:
        DeviceError: out of memory.
    """
    stack = model.anatomy.stack
    pooler = getattr(stack, "pooler", None)
    unread = set(pooler.modules()) if isinstance(pooler, nn.Module) else set()
    if isinstance(scores, LabelHead) and len(scores.fields) > 1:
        unread = set()
    seen: set[nn.Module] = set(stack.modules()) - unread
    n_logits = None
    if head_reads is not None:
        n_logits, ran = _run_head(Head(model, head_reads), model)
        seen |= ran
    if isinstance(scores, LabelHead):
        seen |= _run_scores(scores, model)
    # Without `keep_vars` every entry is detached, a new object, and tied tensors could not be told by `id`.
    # A tied tensor is seen under all of its names, whichever of its modules ran.
    tensors = model.model.state_dict(keep_vars=True)
    modules = {n for n, m in model.model.named_modules(remove_duplicate=False) if m in seen}
    found = {id(tensor) for name, tensor in tensors.items() if name.rpartition(".")[0] in modules}
    names = frozenset(name for name, tensor in tensors.items() if id(tensor) in found)
    return Coverage(Compared(frozenset(modules), names), n_logits)


def _run_head(head: Head, model: LoadedModel) -> tuple[int, set[nn.Module]]:
    """Return the number of logits of a row, and the modules that ran for them."""
    # Zeros serve: all that matters is which modules run, and how many logits come out.
    states = torch.zeros(1, model.anatomy.hidden_size, dtype=model.model.dtype, device=model.device)
    with modules_run(model) as ran:
        n_logits = head.logits(states).shape[-1]
    # An adapter's parts, and the module that it stands in for, have no forward pass of their own.
    return n_logits, ran | set(model.model.get_output_embeddings().modules())


def _run_scores(head: LabelHead, model: LoadedModel) -> set[nn.Module]:
    """Return the modules that run for the scores, with all that is in them."""
    stack = model.anatomy.stack
    with torch.no_grad(), modules_run(model) as ran:
        head.run_sample()
    # What is around the stack runs too. An adapter's parts have no forward pass of their own.
    return {inside for m in ran for inside in m.modules() if stack not in m.modules()}
