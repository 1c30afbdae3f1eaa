"""A model's own LM head on a few rows: whatever it does between the last block and the logits.

No list of families: the LM head is run by the model's own code. To get logits out of states after the final
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

from lazarus.engine.recorder import Recorder, Recording, accepted, calling, first_tensor, shortened
from lazarus.engine.replay import Returned
from lazarus.errors import UnsupportedModelError
from lazarus.models import LoadedModel


class Head:
    """The LM head of one model, on rows [rows, hidden] of one sequence."""

    def __init__(
        self, model: LoadedModel, output_class: type[ModelOutput], *, with_grad: bool = False
    ) -> None:
        """Take the class of what the stack hands to the head, and whether its logits need a gradient."""
        self._with_grad = with_grad
        self._loaded = model
        self.model = model.model
        self.stack = model.anatomy.stack
        self.last_block = model.anatomy.blocks[-1]
        self.n_tokens = int(self.model.config.get_text_config().vocab_size)
        self._output_class = output_class

    def logits(self, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocabulary"]:
        """Next-token logits from states after the final norm.

        Raises:
            UnsupportedModelError: what the stack returns is not made of states alone.
        """
        try:
            given = self._output_class(last_hidden_state=states[None])
        except (TypeError, ValueError) as error:
            # Its class has required fields of its own. No `calling`: Python blames the caller for that.
            raise UnsupportedModelError(f"{self._loaded.name}: {shortened(error)}") from error
        with returning(self.stack, given):
            return self._run(len(states), states.device)

    def read(self, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocabulary"]:
        """Next-token logits from states of the residual stream: through the final norm and the LM head."""
        return self.read_sequence(states[None], 1)

    def read_sequence(self, states: Tensor, time_axis: int) -> Float[Tensor, "rows vocabulary"]:
        """Return the same for the states of one sequence, in the axes in which the last block returns them.

        Each place along `time_axis` is a row: all that comes after the last block treats it by itself.
        """
        with _block_returning(self.last_block, states):
            return self._run(states.shape[time_axis], states.device)

    def _run(self, n_rows: int, device: torch.device) -> Tensor:
        """Run the model on so many tokens of any kind.

        Raises:
            DeviceError: the device lacks an operator.
            UnsupportedModelError: the head wants more than states.
        """
        # Any ids do: their hidden states are replaced on the way.
        ids = torch.zeros(1, n_rows, dtype=torch.long, device=device)
        with torch.set_grad_enabled(self._with_grad), calling(self._loaded, ids.shape):
            output = self.model(input_ids=ids, **accepted(self.model))
            logits: Tensor = output.logits
            return logits[0]


@dataclass
class WholePass:
    """One pass of a model with its LM head: a recording of the stack, what the head got, and the logits."""

    recording: Recording
    stack_output: Any = None
    logits: Tensor | None = None

    @property
    def head_reads(self) -> type[ModelOutput]:
        """Return what the stack hands to the head."""
        return type(self.stack_output)


def run_with_head(
    recorder: Recorder, input_ids: Int[Tensor, "batch time"], mask: Int[Tensor, "batch time"]
) -> WholePass | None:
    """Run a model with its LM head; None where it has none, or one that wants more than token ids.

    Raises:
        DeviceError: the device lacks an operator.
    """
    model = recorder.model.model
    # A bare stack has no head; an encoder-decoder wants decoder tokens besides.
    if recorder.stack is model or model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        return None

    def at_stack(_module: nn.Module, _args: Any, output: Any) -> None:
        # `whole` is bound below, before the model runs and this hook with it.
        whole.stack_output = output
        whole.recording.final = getattr(output, "last_hidden_state", None)

    handle = recorder.stack.register_forward_hook(at_stack)
    try:
        with torch.no_grad(), recorder.attached(torch.Tensor.detach) as recording:
            whole = WholePass(recording)
            arguments = accepted(model, attention_mask=mask.to(recorder.device))
            with calling(recorder.model, input_ids.shape):
                output = model(input_ids=input_ids.to(recorder.device), **arguments)
    except UnsupportedModelError:
        return None
    finally:
        handle.remove()
    whole.logits = getattr(output, "logits", None)
    return None if whole.recording.final is None or whole.logits is None else whole


NO_HEAD = "no next-token head that can be run by itself"


@dataclass(frozen=True)
class HeadCheck:
    """The check of an LM head by itself: what the stack hands to it, or why it cannot be run so."""

    reads: type[ModelOutput] | None
    why_not: str = NO_HEAD


def head_alone(recorder: Recorder, batch: tuple[Tensor, Tensor], whole: WholePass) -> HeadCheck:
    """Check that the LM head by itself gives the logits of the whole model, from states after the final norm.

    Where not one logit of the whole model is finite, that says nothing of the head: it is checked on random
    states, which take the place of the model's own.
    """
    head = Head(recorder.model, whole.head_reads)
    try:
        same = _same_alone(head, whole)
        if same is None:
            states = _random(whole.stack_output.last_hidden_state)
            # Its hook stands before that of `run_with_head`, which therefore sees the random states.
            with _stack_replaced(recorder.stack, states):
                replaced = run_with_head(recorder, *batch)
            same = None if replaced is None else _same_alone(head, replaced)
    except UnsupportedModelError:
        same = False  # a head that wants more than states: no output is measured
    if same is None:
        name = recorder.model.name
        return HeadCheck(None, f"the logits of {name} are not finite, so its head could not be checked")
    return HeadCheck(whole.head_reads if same else None)


def reads_blocks(recorder: Recorder, batch: tuple[Tensor, Tensor], whole: WholePass) -> bool | None:
    """Check that the LM head gives the whole model's logits from the last block's output, through the norm.

    None where that cannot be seen: no logit is finite, not even on random states.
    """
    head = Head(recorder.model, whole.head_reads)
    try:
        same = _same_from_block(head, whole, whole.recording.blocks[-1])
        if same is None:
            states = _random(whole.recording.blocks[-1])
            with _block_returning(head.last_block, states):
                replaced = run_with_head(recorder, *batch)
            same = None if replaced is None else _same_from_block(head, replaced, states)
    except UnsupportedModelError:
        return False  # what comes after the blocks wants other states
    return same


def _same_alone(head: Head, whole: WholePass) -> bool | None:
    assert whole.logits is not None
    states = whole.stack_output.last_hidden_state
    logits = head.logits(states.reshape(-1, states.shape[-1]))
    return _alike(logits.reshape(whole.logits.shape), whole.logits)


def _same_from_block(head: Head, whole: WholePass, states: Tensor) -> bool | None:
    assert whole.logits is not None
    if states.shape[:-1] != whole.logits.shape[:-1]:
        return False  # states of other axes than prompts, tokens and features
    return _alike(head.read(states[0]), whole.logits[0])


def _random(like: Tensor) -> Tensor:
    """Random states of the usual size, the same ones each time."""
    # Drawn on the CPU: the same states on every device.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator).to(like)


def _alike(logits: Tensor, expected: Tensor) -> bool | None:
    return alike(logits, expected, torch.finfo(expected.dtype).eps)


def alike(logits: Tensor, expected: Tensor, eps: float) -> bool | None:
    """Return whether logits differ from the expected ones by rounding to `eps` at most.

    The limit is relative to the largest logit, because some are tiny. Only the logits that are expected to be
    finite are compared; None where there are none.
    """
    told = expected.isfinite()
    if not told.any():
        return None
    limit, found, wanted = max(1e-3, 8 * eps), logits[told], expected[told]
    return torch.allclose(found, wanted, rtol=limit, atol=limit * wanted.abs().amax().item())


@contextmanager
def _block_returning(block: nn.Module, states: Tensor) -> Iterator[None]:
    """The block returns these hidden states, beside whatever else it returns, while the context lasts."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        # The block has run on states of no interest, for whatever it returns beside its hidden states.
        return Returned.of(output).whole(states.to(first_tensor(output)))

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _stack_replaced(stack: nn.Module, states: Tensor) -> Iterator[None]:
    """The stack returns these states after its final norm while the context lasts."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        output.last_hidden_state = states

    handle = stack.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def returning(module: nn.Module, output: Any) -> Iterator[None]:
    """The module returns `output` whatever it is given, while the context lasts."""
    own = vars(module).get("forward")  # accelerate puts one of its own there
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
