"""The outputs of a model beside next tokens: scores of labels, of a prompt or of its tokens; an embedding.

A head of labels is run by the model's own code, on one prompt at a time: the stack is made to return what it
has made of that prompt, without padding. Some heads find the end of a prompt by the id of the padding token,
some by the mask, and some refuse several prompts: of one prompt without padding all give what they give when
it runs alone. A short pass checks that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lazarus.batches import Padding, TokenBatch
from lazarus.engine.head import alike, returning
from lazarus.engine.positions import RowPicker
from lazarus.engine.recorder import Recorder, RowSelection, accepted, calling
from lazarus.errors import DeviceError, UnsupportedModelError
from lazarus.metrics import ScoreKind, to_float64
from lazarus.models import Embedder, LoadedModel
from lazarus.sites import Position

_STATES = "last_hidden_state"


class ScoreHead(ABC):
    """Makes scores, or an embedding, of what a stack returns of one prompt."""

    kind: ScoreKind
    fields: tuple[str, ...]
    """what it reads of the stack's output"""

    @abstractmethod
    def scores(self, ids: Sequence[int], given: Mapping[str, Tensor]) -> Float[Tensor, "rows width"]:
        """Return the scores of a prompt: one row, or one a token.

        `given` is what the stack has made of that prompt alone, with a batch of one in front.
        """


@dataclass(frozen=True)
class LabelConventions:
    """The way in which the scores of a model's labels are made."""

    kind: ScoreKind
    output_class: type[ModelOutput]
    """what the stack hands to the head"""
    sample_ids: Sequence[int]
    sample: Mapping[str, Tensor]
    """what the head reads of that, for a short prompt"""


class LabelHead(ScoreHead):
    """A model's own head of labels, run by the model's own code."""

    def __init__(self, model: LoadedModel, conventions: LabelConventions) -> None:
        self.model = model
        self.kind = conventions.kind
        self.fields = tuple(conventions.sample)
        self._conventions = conventions

    def scores(self, ids: Sequence[int], given: Mapping[str, Tensor]) -> Float[Tensor, "rows width"]:
        """Return the scores of a prompt: one row, or one a token.

        Raises:
            UnsupportedModelError: the head wants more than that.
        """
        with returning(self.model.anatomy.stack, self._conventions.output_class(**given)):
            logits = _logits(self.model, ids)
        return logits.reshape(-1, logits.shape[-1])

    def run_sample(self) -> None:
        """Run on a short prompt, for whoever looks at which modules run."""
        self.scores(self._conventions.sample_ids, self._conventions.sample)


class EmbeddingHead(ScoreHead):
    """The modules of a sentence-transformers model after its transformer."""

    kind: ScoreKind = "embedding"
    fields = (_STATES,)

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def scores(self, ids: Sequence[int], given: Mapping[str, Tensor]) -> Float[Tensor, "rows width"]:
        """Return the embedding of a prompt as one row."""
        return self.embedder.embed(given[_STATES][0])[None]


class BatchScores:
    """The scores of one batch, made as soon as the stack has returned."""

    def __init__(self, head: ScoreHead, batch: TokenBatch, position: Position) -> None:
        # A mean of tokens' scores is no token's score: of a mean of states every token is compared.
        self._picker = RowPicker.of(batch, "all" if position == "mean" else position)
        self._head = head
        self._batch = batch
        self.rows = torch.empty(0)
        self.prompts = self._picker.prompts if head.kind == "token_scores" else torch.tensor(batch.prompts)
        """whose each row is"""

    def take(self, output: Any) -> None:
        """Make the scores of what the stack returned of the batch."""
        head, found = self._head, list[Tensor]()
        for row, prompt in enumerate(self._batch.members):
            scores = head.scores(prompt.ids, _row(output, head.fields, row, len(prompt.ids)))
            if head.kind == "token_scores":
                scores = scores[self._picker.tokens[self._picker.rows == row].to(scores.device)]
            found.append(scores)
        self.rows = torch.cat(found)


@dataclass(frozen=True)
class LabelCheck:
    """The check of a head of labels: how it is run, or why it is not; neither where there is none."""

    conventions: LabelConventions | None = None
    why_not: str | None = None


NO_LABELS = LabelCheck()


def check_labels(
    recorder: Recorder,
    batch: tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]],
    padding: Padding,
    output: Any,
) -> LabelCheck:
    """Check that a head of labels gives the whole model's scores of each prompt alone.

    It is run on what the stack returns of a batch such as the run has; `output` is that of the whole batch. A
    model has such a head if it gives as many logits, of a prompt or of each token, as its configuration names
    labels.
    """
    model = recorder.model
    if recorder.stack is model.model or model.model.get_output_embeddings() is not None:
        return NO_LABELS
    # Its labels may be the decoder's, which wants tokens of its own.
    if model.model.config.is_encoder_decoder:
        return NO_LABELS
    rows = _unpadded(batch, padding)
    first = rows[min(rows)]
    try:
        with torch.no_grad(), modules_run(model) as ran:
            alone = [_logits(model, ids) for ids in rows.values()]
    except (DeviceError, UnsupportedModelError, _NoLabelsError):
        return NO_LABELS  # its states can be compared all the same
    kind = _kind(alone[0], len(first), model)
    if kind is None:
        return NO_LABELS
    if random := missing_in(model, ran):
        return LabelCheck(why_not=f"{model.name} lacks {random[0]}, so its head holds random numbers")
    if not any(bool(each.isfinite().any()) for each in alone):
        return LabelCheck(
            why_not=f"the scores of {model.name} are not finite, so its head could not be checked"
        )
    expected = torch.cat([each.reshape(-1, each.shape[-1]) for each in alone])
    if padding != "right":
        output = _stack_output(recorder, *(each[: len(rows)] for each in batch))
    with torch.no_grad():
        for fields in _tried(output):
            sample = _row(output, fields, min(rows), len(first))
            conventions = LabelConventions(kind, type(output), first, sample)
            if _gives(LabelHead(model, conventions), rows, output, expected):
                return LabelCheck(conventions)
    return LabelCheck(why_not=f"the head of {model.name} does not give its scores of the states alone")


class _NoLabelsError(Exception):
    """A whole model returns no logits."""


def _logits(model: LoadedModel, ids: Sequence[int]) -> Tensor:
    """The logits of the whole model for one prompt by itself."""
    row = torch.tensor([list(ids)], device=model.device)
    arguments = accepted(model.model, attention_mask=torch.ones_like(row))
    with calling(model, row.shape):
        output = model.model(input_ids=row, **arguments)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise _NoLabelsError
    return logits


def _kind(logits: Tensor, length: int, model: LoadedModel) -> ScoreKind | None:
    n_labels = getattr(model.model.config, "num_labels", None)
    if logits.shape == (1, n_labels):
        return "scores"
    return "token_scores" if logits.shape == (1, length, n_labels) else None


def _unpadded(batch: tuple[Tensor, Tensor], padding: Padding) -> dict[int, list[int]]:
    """Rows of the probe's batch that the run may have together, by their numbers, without their padding."""
    # The last row is padded, and the two before it are of one length.
    chosen = {"right": (0, -1), "equal_lengths": (0, 1), "one_by_one": (0,)}[padding]
    rows = [i % len(batch[0]) for i in chosen]
    return {i: batch[0][i][batch[1][i].bool()].tolist() for i in rows}


def _stack_output(recorder: Recorder, input_ids: Tensor, mask: Tensor) -> Any:
    found: list[Any] = []
    nothing = RowSelection(lambda states: states.new_empty(0), torch.Tensor.detach, found.append)
    recorder.run(input_ids, mask, nothing)
    return found[0]


def _tried(output: Any) -> Iterator[Sequence[str]]:
    """Yield the fields that a head may read: the states alone, or all that the stack makes of each prompt."""
    if not isinstance(output, ModelOutput) or _STATES not in output:
        return
    yield (_STATES,)
    n_prompts = len(output[_STATES])
    everything = [n for n, each in output.items() if isinstance(each, Tensor) and len(each) == n_prompts]
    if len(everything) > 1:
        yield everything


def _gives(head: LabelHead, rows: Mapping[int, Sequence[int]], output: Any, expected: Tensor) -> bool:
    try:
        found = torch.cat(
            [head.scores(ids, _row(output, head.fields, i, len(ids))) for i, ids in rows.items()]
        )
    except (UnsupportedModelError, _NoLabelsError):
        return False
    # Against a wide copy: the limit is relative to the largest score.
    limit = torch.finfo(expected.dtype).eps
    return found.shape == expected.shape and alike(to_float64(found), to_float64(expected), limit) is True


def _row(output: Any, fields: Sequence[str], row: int, length: int) -> dict[str, Tensor]:
    """Return what a stack has returned of one row, without padding."""
    given = {name: output[name][row : row + 1] for name in fields}
    return given | {_STATES: given[_STATES][:, :length]}


def missing_in(model: LoadedModel, modules: set[nn.Module]) -> list[str]:
    """Return the tensors of some modules that no file has filled: they hold random numbers."""
    if not model.missing:
        return []
    inside = {name for name, module in model.model.named_modules() if module in modules}
    # Under these two names PEFT keeps what is the model's own.
    plain = {
        name: name.replace(".original_module.", ".").replace(".base_layer.", ".")
        for name in model.model.state_dict()
        if name.rpartition(".")[0] in inside
    }
    return [name for name, own in plain.items() if own in model.missing]


@contextmanager
def modules_run(model: LoadedModel) -> Iterator[set[nn.Module]]:
    """Collect the modules of a model that run while the context lasts."""
    ran = set[nn.Module]()

    def note(module: nn.Module, _args: Any) -> None:
        ran.add(module)

    handles = [m.register_forward_pre_hook(note) for m in model.model.modules()]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()
