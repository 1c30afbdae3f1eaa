"""The integrand of an attribution: how KL(base‖path) changes with each parameter, at one point of a path."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor, autograd
from transformers.utils import ModelOutput

from lazarus.batches import TokenBatch
from lazarus.blame import Translated
from lazarus.engine.contributions import Contributions, Owners
from lazarus.engine.head import Head
from lazarus.engine.path import Path
from lazarus.engine.positions import RowPicker
from lazarus.engine.recorder import accepted, calling, first_tensor, shortened
from lazarus.errors import UnsupportedModelError
from lazarus.messages import option
from lazarus.metrics import MOST_LOGITS
from lazarus.sites import Position

_RELATIVE, _OF_ALL = 1e-2, 1e-4
"""How far a contribution may be from the exact one: a share of it, and of the sum of all."""


@dataclass(frozen=True)
class Asked:
    """The compared rows of a batch, and what base predicts there."""

    batch: TokenBatch
    picker: RowPicker
    logits: Float[Tensor, "rows vocabulary"]
    """base's, in float32"""
    rows: Tensor
    """the prompt of each row, counted within the batch"""
    weights: Float[Tensor, " rows"]
    """the share of each row in its prompt's KL"""


class PathRunner:
    """Runs batches at the point where a path is."""

    def __init__(self, path: Path, head_reads: type[ModelOutput], position: Position) -> None:
        self.path = path
        self.position = position
        self.head = Head(path.model, head_reads, with_grad=True)
        self.n_rows = max(1, MOST_LOGITS // self.head.n_tokens)

    def ask(self, batch: TokenBatch) -> Asked:
        """Run a batch with the path at base."""
        picker = RowPicker.of(batch, self.position)
        if picker.average:  # a mean of states is no token's, so the head reads the last one
            picker = RowPicker.of(batch, "last")
        with torch.no_grad():
            states = picker.pick(self._final(batch))
            logits = torch.cat([self._logits(part) for part in torch.split(states, self.n_rows)])
        own = {prompt: i for i, prompt in enumerate(batch.prompts)}
        rows = torch.tensor([own[prompt] for prompt in picker.prompts.tolist()])
        counts = torch.bincount(rows, minlength=len(batch.prompts))
        return Asked(batch, picker, logits, rows, 1 / counts[rows])

    def kl(self, asked: Asked) -> Float64[Tensor, " prompts"]:
        """Return KL(base‖here) of each prompt of a batch, in nats: the mean over its compared tokens."""
        with torch.no_grad():
            states = asked.picker.pick(self._final(asked.batch))
            both = (torch.split(rows, self.n_rows) for rows in (asked.logits, states))
            kl = [_kl(logits, self._logits(part)) for logits, part in zip(*both, strict=True)]
        return _by_prompt(asked, torch.cat(kl))

    def add_up(self, asked: Asked, seen: Contributions) -> None:
        """Find out how the KL of each prompt of a batch changes along every change: `seen.found`.

        Raises:
            UnsupportedModelError: the model's backward pass does not run.
        """
        batch, n_prompts = asked.batch, len(asked.batch.members)
        seen.begin(n_prompts)
        back = Translated(f"the backward pass of {self.path.model.name}", self._told)
        with seen.attached(), torch.enable_grad():
            seen.owners = Owners.of_batch(n_prompts, batch.padded_length)
            states = asked.picker.pick(self._final(batch))
            leaf = states.detach().requires_grad_()
            for start in range(0, len(leaf), self.n_rows):
                part = slice(start, start + self.n_rows)
                seen.owners = Owners.of_tokens(asked.rows[part], n_prompts)
                logits = self._logits(leaf[part])
                # The gradient of KL(p‖softmax(z)) is softmax(z) − p.
                gradient = logits.detach().softmax(-1).sub_(asked.logits[part].softmax(-1))
                with back:
                    autograd.backward(logits, gradient.mul_(asked.weights[part, None].to(gradient)))
            if states.requires_grad:
                with back:
                    autograd.backward(states, leaf.grad)

    def learn(self, batch: TokenBatch) -> Contributions:
        """Learn on a few prompts how the contribution of each change is found: by outputs, or by gradient.

        By gradient where the outputs do not give what the gradient does, and then of one prompt at a time.

        Raises:
            UnsupportedModelError: the model's backward pass does not run.
        """
        changes, model = self.path.changes, self.path.model.model
        by_outputs = Contributions(changes, model, is_learning=True)
        by_gradient = Contributions(changes, model, set(range(len(changes))))
        self.path.move(0.0)
        asked = self.ask(batch)
        singles = [self.ask(replace(batch, members=[member])) for member in batch.members]
        self.path.move(0.5)
        expected = []
        for single in singles:
            self.add_up(single, by_gradient)
            expected.append(by_gradient.found[:, 0])
        exact = torch.stack(expected, dim=1)
        self.add_up(singles[0], by_outputs)
        wrong = _wrong(by_outputs.found, exact[:, :1]) | set(by_outputs.faults)
        # With one prompt alone it is not seen whether several can be told apart.
        if wrong or len(batch.members) == 1:
            return Contributions(changes, model, wrong, one_by_one=True)
        self.add_up(asked, by_outputs)
        is_parted = not by_outputs.faults and not _wrong(by_outputs.found, exact)
        return Contributions(changes, model, one_by_one=not is_parted)

    def _told(self, error: BaseException) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path.model.name}: its backward pass does not run: {shortened(error)}. Leave "
            f"{option('attribute')} out.",
            option="attribute",
        )

    def _final(self, batch: TokenBatch) -> Float[Tensor, "batch time hidden"]:
        ids, mask = batch.padded()
        model = self.path.model
        stack, device = model.anatomy.stack, model.device
        arguments = accepted(stack, attention_mask=mask.to(device))
        with calling(model, ids.shape):
            output = stack(input_ids=ids.to(device), **arguments)
        last = getattr(output, "last_hidden_state", None)
        return first_tensor(output) if last is None else last

    def _logits(self, states: Tensor) -> Float[Tensor, "rows vocabulary"]:
        return self.head.logits(states).float()


def _wrong(found: Tensor, exact: Tensor) -> set[int]:
    """Return the changes of which the contributions are not those that are exact."""
    scale = exact.abs().sum(0).amax()
    off = ((found - exact).abs() > _RELATIVE * exact.abs() + _OF_ALL * scale).any(1)
    return set(off.nonzero()[:, 0].tolist())


def _kl(base: Tensor, here: Tensor) -> Float64[Tensor, " rows"]:
    # In float64: of close distributions the terms nearly cancel.
    log_p, log_q = base.double().log_softmax(-1), here.double().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    # A token that cannot come adds nothing; 0 · ∞ is NaN.
    return terms.masked_fill_(log_p == -torch.inf, 0.0).sum(-1)


def _by_prompt(asked: Asked, values: Tensor) -> Float64[Tensor, " prompts"]:
    sums = torch.zeros(len(asked.batch.members), dtype=torch.float64)
    return sums.index_add_(0, asked.rows, (values.cpu() * asked.weights))
