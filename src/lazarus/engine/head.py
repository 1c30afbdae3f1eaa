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

from lazarus.engine.recorder import FORWARD_FAULTS, accepted, first_tensor
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

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            given = states[None].to(first_tensor(output))
            return given if isinstance(output, Tensor) else type(output)((given, *output[1:]))

        handle = self.last_block.register_forward_hook(hook)
        try:
            return self._run(len(states), states.device)
        finally:
            handle.remove()

    def _run(self, n_rows: int, device: torch.device) -> Tensor:
        ids = torch.zeros(1, n_rows, dtype=torch.long, device=device)
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=ids, **accepted(self.model)).logits
        return logits[0]


def find_head(
    model: LoadedModel, input_ids: Int[Tensor, "batch time"], mask: Int[Tensor, "batch time"]
) -> tuple[type[ModelOutput] | None, bool]:
    """What the stack returns to the head, None if the head cannot be run by itself; and if it reads blocks.

    The head by itself must give the logits of the whole model on these tokens: from the states after the
    final norm, and, to read blocks, from those that leave the last block.
    """
    stack, whole = model.anatomy.stack, model.model
    if stack is whole or whole.get_output_embeddings() is None:
        return None, False
    try:
        seen, expected = _run_whole(model, input_ids, mask)
        head = Head(model, type(seen.output))
        states = seen.output.last_hidden_state
        logits = head.logits(states.reshape(-1, states.shape[-1]))
    except FORWARD_FAULTS:
        return None, False  # a head that wants more than token ids and states: no output is measured
    if not _alike(logits.reshape(expected.shape), expected):
        return None, False
    try:
        read = head.read(seen.last_block[0])
    except FORWARD_FAULTS:
        return type(seen.output), False  # streams of other axes than rows and features
    return type(seen.output), read.shape == expected[0].shape and _alike(read, expected[0])


@dataclass
class _Seen:
    """What one pass of the whole model showed: what the stack returned, and what left the last block."""

    output: Any = None
    last_block: Any = None


def _run_whole(model: LoadedModel, input_ids: Tensor, mask: Tensor) -> tuple[_Seen, Tensor]:
    """The logits of the whole model, [batch, time, vocabulary], and what led to them."""
    seen = _Seen()

    def at_stack(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.output = output

    def at_block(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.last_block = first_tensor(output)

    stack, device = model.anatomy.stack, next(model.anatomy.stack.parameters()).device
    handles = [
        stack.register_forward_hook(at_stack),
        model.anatomy.blocks[-1].register_forward_hook(at_block),
    ]
    try:
        with torch.no_grad():
            arguments = accepted(model.model, attention_mask=mask.to(device))
            return seen, model.model(input_ids=input_ids.to(device), **arguments).logits
    finally:
        for handle in handles:
            handle.remove()


def _alike(logits: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding, on the scale of the largest: some heads give logits of a thousandth."""
    limit = max(1e-3, 8 * torch.finfo(expected.dtype).eps)
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
