"""Blocks that need not run: the model's own code goes on from what they returned before.

A model's forward pass cannot be entered in the middle, but it can be run with its first blocks replaced by
their recorded return values. What the code does between and around the blocks (masks, positions, streams)
it does as ever. Two things rest on it: blocks that both models have in common run once, and models bigger
than memory run one block at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lazarus.engine.arguments import Arguments, Written, contents, write_again, written
from lazarus.engine.recorder import first_tensor
from lazarus.models import Equality, same_bits


class UnlikeError(Exception):
    """A block was called with other arguments than the recorded call: it has to run."""


class StoppedError(Exception):
    """A pass was ended where it was to end."""


@dataclass(frozen=True)
class Returned:
    """A block's output without its hidden states: its type, and whatever else was in it."""

    kind: type
    keys: tuple[Any, ...] | None
    others: tuple[Any, ...]

    @classmethod
    def of(cls, output: Any) -> Returned:
        """Return what is kept of a block's return value."""
        if isinstance(output, Tensor):
            return cls(Tensor, None, ())
        if isinstance(output, Mapping):
            return cls(type(output), tuple(output), tuple(output.values())[1:])
        return cls(type(output), None, tuple(output[1:]))

    def whole(self, states: Tensor) -> Any:
        """The return value with these hidden states in it."""
        if self.kind is Tensor:
            return states
        values = (states, *self.others)
        if self.keys is not None:
            return self.kind(dict(zip(self.keys, values, strict=True)))
        return getattr(self.kind, "_make", self.kind)(values)  # a named tuple takes its fields one by one


@dataclass(frozen=True)
class Call:
    """One call of a block: its arguments, what it was given in them, what it returned, and what it wrote."""

    block: nn.Module
    args: tuple[Any, ...]
    received: Arguments
    output: Any
    written: Written


@dataclass
class Passed:
    """The state of a pass after its first blocks: enough for another pass to go on from there.

    Only the last one's hidden states are kept: those of the others went to the next block, and nowhere else
    (`can_replay` makes sure).
    """

    states: Tensor | None = None
    returned: list[Returned] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    """what each block wrote into arguments that it shares with others"""
    received: list[Arguments] = field(default_factory=list)
    """each block's arguments; of hidden states, those of the first block alone"""

    def add(self, call: Call) -> None:
        """Take in the next block's call."""
        self.received.append(call.received.without_states() if self.returned else call.received)
        self.returned.append(Returned.of(call.output))
        self.states = first_tensor(call.output)
        self.written.append(call.written)

    def parts(self) -> tuple[Any, ...]:
        """Return what a later pass needs, as plain tuples and lists; the arguments are left out."""
        last: Written = [{} for _ in self.written[0]]
        for each in self.written:
            # What counts for the next block is what stands in its arguments, whoever wrote it.
            last = [{**before, **items} for before, items in zip(last, each, strict=True)]
        return self.states, [(r.kind, r.keys, r.others) for r in self.returned], last

    @classmethod
    def of_parts(cls, parts: tuple[Any, ...]) -> Passed:
        """Undo `parts`, except that the first block now counts as having written what all of them wrote."""
        states, returned, last = parts
        nothing: Written = [{} for _ in last]
        return cls(states, [Returned(*each) for each in returned], [last, *[nothing] * (len(returned) - 1)])

    @property
    def n_layers(self) -> int:
        """Count the first layers of a KV cache that these blocks use: as many as they are, or wrote to."""
        layers = (name for each in self.written for items in each for name in items if isinstance(name, int))
        return max((len(self.returned), *(layer + 1 for layer in layers)))

    def again(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what block `index` returned; what it had written is written again."""
        assert self.states is not None
        write_again(args, kwargs, self.written[index])
        return self.returned[index].whole(self.states)


@contextmanager
def recording(blocks: Sequence[nn.Module], take: Callable[[Call], None]) -> Iterator[None]:
    """While a model runs, hand each call of these blocks to `take`."""
    begun: dict[nn.Module, list[tuple[Arguments, Written]]] = defaultdict(list)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun[module].append((Arguments.of(args, kwargs), contents(args, kwargs)))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        received, held = begun[module].pop()
        take(Call(module, args, received, output, written(held, contents(args, kwargs))))

    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def stopping_after(block: nn.Module) -> Iterator[None]:
    """End the pass inside once this block has run, and whatever else is hooked to it."""

    def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise StoppedError

    handle = block.register_forward_hook(hook)
    try:
        yield
    except StoppedError:
        return
    finally:
        handle.remove()


@contextmanager
def replaying(blocks: Sequence[nn.Module], passed: Passed, *, verify: bool) -> Iterator[None]:
    """While a model runs, these first blocks of it return what was recorded, and do not run.

    With `verify` it raises `UnlikeError` where one is called with other arguments than were recorded, so
    that what is replayed is, bit for bit, what the block would have returned.
    """
    equality, n_layers = Equality(), passed.n_layers

    def standing_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if verify:
                received = Arguments.of(args, kwargs)
                # The states that enter a later block were replayed as well, so they are the recorded ones.
                given = received.without_states() if index else received
                if not given.same_as(passed.received[index], equality, n_layers):
                    raise UnlikeError
            return passed.again(index, args, kwargs)

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(_forward_replaced(block, standing_in(index)))
        yield


@contextmanager
def stopping_before(block: nn.Module, received: list[Arguments]) -> Iterator[None]:
    """End the pass inside before this block runs; `received` gets its arguments."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        received.append(Arguments.of(args, kwargs))
        raise StoppedError

    with _forward_replaced(block, forward):
        try:
            yield
        except StoppedError:
            return


def can_replay(blocks: Sequence[nn.Module], run: Callable[[], Tensor], counts: Sequence[int]) -> bool:
    """Return whether a pass goes on after its first n blocks, for each n of `counts`, as if they had run.

    `run` is a pass over a few tokens, and returns its last hidden states. Each later pass must call the next
    block with the very arguments of the first, and come to the same end, bit for bit. Only the first pass
    runs blocks: in the others they are replaced.
    """
    calls: list[Call] = []
    with recording(blocks, calls.append):
        end = run()
    # Where blocks run twice or in another order, no pass stands after its first n blocks.
    if [call.block for call in calls] != list(blocks):
        return False
    passed = Passed()
    for index, call in enumerate(calls):
        if index in counts and not _goes_on(blocks, passed, run, call):
            return False
        passed.add(call)
    with replaying(blocks, passed, verify=False):
        return same_bits(run(), end) is True


def _goes_on(blocks: Sequence[nn.Module], passed: Passed, run: Callable[[], Tensor], expected: Call) -> bool:
    """Return whether the next block is called as it was when the blocks before it ran."""
    index, received = len(passed.returned), list[Arguments]()
    try:
        with replaying(blocks[:index], passed, verify=True), stopping_before(blocks[index], received):
            run()
    except UnlikeError:
        return False
    return bool(received) and received[0].same_as(expected.received, Equality())


@contextmanager
def _forward_replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` on this very module, as libraries put it there; hooks go on as ever."""
    # Only an attribute of the instance is put back: that of the class shows again when ours is gone.
    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before
