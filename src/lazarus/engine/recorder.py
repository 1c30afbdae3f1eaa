"""The states at every site of one model's forward pass, picked while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lazarus._transformers import cache_name
from lazarus.blame import Translated, one_line
from lazarus.engine.prefix_cache import PrefixCache
from lazarus.errors import DeviceError, LazarusError, UnsupportedModelError
from lazarus.messages import CAUSE, option
from lazarus.models import LoadedModel


@dataclass(frozen=True)
class RowSelection:
    """The choice of rows to keep: of a block's states, and of those after the stack [batch, time, hidden]."""

    block: Callable[[Tensor], Tensor]
    final: Callable[[Tensor], Tensor]
    output: Callable[[Any], None] | None = None
    """is given all that the stack returns"""


@dataclass
class Recording:
    """The states of one pass: what entered the first block, each block's output, and the end."""

    embedding: Tensor | None
    blocks: list[Tensor]
    order: list[int]
    final: Tensor | None
    cache: Any = None
    """what a later pass can go on from, where one was asked for"""

    @property
    def sites(self) -> list[Tensor]:
        """The rows that were kept, in the order in which the states went on."""
        return [kept for kept in (self.embedding, *self.blocks, self.final) if kept is not None]


class Recorder:
    """Runs a stack on token ids and hands each site's states to `take` as soon as they are there.

    What `take` returns is kept, and nothing else: whole activations are freed while the pass goes on.
    A block's output is the first of what it returns; its input is its first positional argument.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.stack = model.anatomy.stack
        self.device = model.device

    @contextmanager
    def attached(self, take: Callable[[Tensor], Tensor], first: int = 0) -> Iterator[Recording]:
        """Hooks on every block from `first` on while the context lasts; they are always taken off again."""
        recording = Recording(None, [], [], None)

        def on_output(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if not recording.blocks and args and isinstance(args[0], Tensor):
                    # Read when the block has run, as no block changes its input in place.
                    # With `first` above 0 it is what enters that block; the caller has the embedding then.
                    recording.embedding = take(args[0])
                recording.blocks.append(take(first_tensor(output)))
                recording.order.append(index)

            return hook

        handles = [
            block.register_forward_hook(on_output(index))
            for index, block in enumerate(self.model.anatomy.blocks)
            if index >= first
        ]
        try:
            yield recording
        finally:
            for handle in handles:
                handle.remove()

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        take: RowSelection,
        first: int = 0,
        prefix_cache: PrefixCache | None = None,
    ) -> Recording:
        """Run one forward pass without the LM head, and record it from block `first` on.

        It goes on from `prefix_cache`, and keeps a cache; without one it runs without a cache.

        Raises:
            DeviceError: the device lacks an operator.
            UnsupportedModelError: the forward pass fails on token ids alone.
        """
        mask = attention_mask.to(self.device)
        given = {"attention_mask": mask} if prefix_cache is None else prefix_cache.arguments(mask)
        arguments = accepted(self.stack, **given)
        # Not `inference_mode`: its tensors count no writes in place, and replaying relies on that count.
        with torch.no_grad(), self.attached(take.block, first) as recording:
            with calling(self.model, input_ids.shape):
                output = self.stack(input_ids=input_ids.to(self.device), **arguments)
            last = getattr(output, "last_hidden_state", None)
            recording.final = take.final(first_tensor(output) if last is None else last)
            if take.output is not None:
                take.output(output)
            recording.cache = None if prefix_cache is None else getattr(output, cache_name(), None)
        return recording


_NO_OPERATOR = ("not implemented for '", "Could not run 'aten::", "not currently implemented for the")
"""The words of torch on an operator that a device lacks, or lacks for a dtype."""


def calling(model: LoadedModel, shape: Sequence[int]) -> Translated:
    """A call of a model, or of a part of it, on a batch of token ids of this shape.

    Raises:
        DeviceError: the device lacks an operator.
        UnsupportedModelError: the model's own code fails.
    """
    where = f"{model.name}, on a batch of {tuple(shape)} tokens"
    return Translated(where, partial(_told, model, where))


def _told(model: LoadedModel, where: str, error: BaseException) -> LazarusError:
    text = shortened(error) or type(error).__name__
    if any(sign in text for sign in _NO_OPERATOR):
        if model.device.type != "cpu":
            return DeviceError(
                f"{where}: {text}. Use {option('device', 'cpu')}, or another {option('dtype')}.",
                option="device",
            )
        return DeviceError(
            f"{where}: {text}. The CPU has no such operator for this dtype: use another {option('dtype')} or "
            f"{option('device', 'cuda')}; quantised weights keep their dtype, so use an unquantised "
            "checkpoint.",
            option="dtype",
        )
    kind = type(model.model).__name__
    if model.model.main_input_name != "input_ids":
        advice = "Lazarus compares models of text."
    else:
        advice = (
            f"The error ({type(error).__name__}) is in the model's own code: {option(CAUSE)} shows where."
        )
    return UnsupportedModelError(f"{where}: {kind} does not run on token ids alone: {text}. {advice}")


def shortened(error: BaseException) -> str:
    """Return what an error says on one line, cut where it goes on for pages."""
    return one_line(error)[:300].rstrip(".")


def first_tensor(output: Any) -> Tensor:
    """A block's hidden states: a tensor, or the first of the tuple, list or output that it returns."""
    found = output if isinstance(output, Tensor) else next(iter(_items(output)), None)
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(
            f"a block returns {type(output).__name__} whose first item is {type(found).__name__}, not "
            "its hidden states. This architecture cannot be compared layer by layer."
        )
    return found


def _items(output: Any) -> Any:
    if isinstance(output, dict):
        return output.values()
    return output if isinstance(output, tuple | list) else ()


def accepted(module: nn.Module, **arguments: Any) -> dict[str, Any]:
    """The arguments of a run, without a cache unless one is asked for, less what the module does not take."""
    # Without a cache: it would hold memory, and a block that runs again would extend it twice.
    arguments = {"use_cache": False, "return_dict": True} | arguments
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    return {name: value for name, value in arguments.items() if name in {p.name for p in parameters}}
