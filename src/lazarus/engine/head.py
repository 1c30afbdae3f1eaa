"""A model's own head on a few rows: whatever it does between the last block and the logits.

No list of families: the head is run by the model's own code. To get logits out of states after the final
norm, the stack is made to return them; to read states before it, the last block is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lazarus.engine.recorder import FORWARD_FAULTS, Recorder, Recording, accepted, first_tensor
from lazarus.models import LoadedModel

MOST_LOGITS = 2**24
"""How many logits are held at once."""


class Head:
    """The head of one model, on rows [rows, hidden] of one sequence."""

    def __init__(self, model: LoadedModel, output_class: type[ModelOutput]) -> None:
        self.model = model.model
        self.stack = model.anatomy.stack
        self.last_block = model.anatomy.blocks[-1]
        self.n_tokens = int(self.model.config.get_text_config().vocab_size)
        self._output_class = output_class

    def logits(self, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocabulary"]:
        """Next-token logits from states after the final norm."""
        given = self._output_class(last_hidden_state=states[None])
        with _returning(self.stack, given):
            return self._run(len(states), states.device)

    def read(self, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocabulary"]:
        """Next-token logits from states of the residual stream: through the final norm, and then the head."""
        return self.read_sequence(states[None], 1)

    def read_sequence(self, states: Tensor, time_axis: int) -> Float[Tensor, "rows vocabulary"]:
        """The same from states as the last block returns them, of one sequence, with axes of their own.

        Each place along `time_axis` is a row: all that comes after the last block treats it by itself.
        """

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            given = states.to(first_tensor(output))
            return given if isinstance(output, Tensor) else type(output)((given, *output[1:]))

        handle = self.last_block.register_forward_hook(hook)
        try:
            return self._run(states.shape[time_axis], states.device)
        finally:
            handle.remove()

    def _run(self, n_rows: int, device: torch.device) -> Tensor:
        ids = torch.zeros(1, n_rows, dtype=torch.long, device=device)
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=ids, **accepted(self.model)).logits
        return logits[0]


@dataclass
class WholePass:
    """One pass of a model with its head: what it showed of the stack, what the head got, and the logits."""

    recording: Recording
    stack_output: Any = None
    logits: Tensor | None = None

    @property
    def head_reads(self) -> type[ModelOutput]:
        """What the stack hands to the head."""
        return type(self.stack_output)


def run_with_head(
    recorder: Recorder, input_ids: Int[Tensor, "batch time"], mask: Int[Tensor, "batch time"]
) -> WholePass | None:
    """Run a model with its head; None where it has none, or one that wants more than token ids."""
    model = recorder.model.model
    if recorder.stack is model or model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        return None

    def at_stack(_module: nn.Module, _args: Any, output: Any) -> None:
        whole.stack_output = output
        whole.recording.final = output.last_hidden_state

    handle = recorder.stack.register_forward_hook(at_stack)
    try:
        with torch.no_grad(), recorder.attached(torch.Tensor.detach) as recording:
            whole = WholePass(recording)
            arguments = accepted(model, attention_mask=mask.to(recorder.device))
            whole.logits = model(input_ids=input_ids.to(recorder.device), **arguments).logits
    except FORWARD_FAULTS:
        return None
    finally:
        handle.remove()
    return whole


def head_alone(model: LoadedModel, whole: WholePass) -> type[ModelOutput] | None:
    """What the stack returns to the head; None if the head cannot be run by itself.

    By itself it must give the logits of the whole model, from the states after the final norm.
    """
    assert whole.logits is not None
    states = whole.stack_output.last_hidden_state
    try:
        logits = Head(model, whole.head_reads).logits(states.reshape(-1, states.shape[-1]))
    except FORWARD_FAULTS:
        return None  # a head that wants more than states: no output is measured
    return whole.head_reads if _alike(logits.reshape(whole.logits.shape), whole.logits) else None


def reads_blocks(model: LoadedModel, whole: WholePass) -> bool:
    """Whether the head gives the whole model's logits from what leaves the last block, through the norm."""
    assert whole.logits is not None
    try:
        read = Head(model, whole.head_reads).read(whole.recording.blocks[-1][0])
    except FORWARD_FAULTS:
        return False  # streams of other axes than rows and features
    return read.shape == whole.logits[0].shape and _alike(read, whole.logits[0])


def _alike(logits: Tensor, expected: Tensor) -> bool:
    return alike(logits, expected, torch.finfo(expected.dtype).eps)


def alike(logits: Tensor, expected: Tensor, eps: float) -> bool:
    """Equal but for rounding to `eps`, on the scale of the largest: some heads give tiny logits."""
    limit = max(1e-3, 8 * eps)
    largest = expected[expected.isfinite()].abs().amax().item() if expected.isfinite().any() else 0.0
    return torch.allclose(logits, expected, rtol=limit, atol=limit * largest, equal_nan=True)


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """The module returns `output` whatever it is given, while the context lasts."""
    own = vars(module).get("forward")  # accelerate puts one of its own there
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
