"""Blocks that need not run: the model's own code goes on from what they returned before.

A model's forward pass cannot be entered in the middle, but it can be run with its first blocks replaced by
their recorded return values. What the code does between and around the blocks (masks, positions, streams)
it does as ever. Two things rest on it: blocks that both models have in common run once, and models bigger
than memory run one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lazarus.engine.recorder import first_tensor

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_Alike = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""pairs of tensors that were found to be the same, by their ids; it holds them, so that ids stay theirs"""
_PLAIN = (bool, int, float, str, type(None))


class UnlikeError(Exception):
    """A block was called with other arguments than the recorded call: it has to run."""


class StoppedError(Exception):
    """A pass was ended where it was to end."""


@dataclass(frozen=True)
class Returned:
    """What a block returned, less its hidden states: its type, and whatever else was in it."""

    kind: type
    keys: tuple[Any, ...] | None
    others: tuple[Any, ...]

    @classmethod
    def of(cls, output: Any) -> Returned:
        """What is kept of a block's return value."""
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
    """One call of a block: what it got, what it returned, and what stood then in the mappings among it."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    shared: list[dict[Any, Any]]


@dataclass
class Passed:
    """What the first blocks of one pass left behind: enough for a pass to go on after the last of them.

    Only the last one's hidden states are kept: those of the others went to the next block, and nowhere else
    (`can_replay` makes sure).
    """

    states: Tensor | None = None
    returned: list[Returned] = field(default_factory=list)
    shared: list[dict[Any, Any]] = field(default_factory=list)
    """what blocks had written by then into each mapping that they share"""
    received: list[_Arguments] = field(default_factory=list)
    """each block's arguments; of hidden states, those of the first block alone"""

    def add(self, call: Call) -> None:
        """Take in the next block's call."""
        self.received.append(_kept_of(len(self.returned), call.args, call.kwargs))
        self.returned.append(Returned.of(call.output))
        self.states, self.shared = first_tensor(call.output), call.shared

    def parts(self) -> tuple[Any, ...]:
        """What a later pass needs, as plain tuples and lists; the arguments are left out."""
        return self.states, [(r.kind, r.keys, r.others) for r in self.returned], self.shared

    @classmethod
    def of_parts(cls, parts: tuple[Any, ...]) -> Passed:
        """The opposite of `parts`."""
        states, returned, shared = parts
        return cls(states, [Returned(*each) for each in returned], shared)

    def again(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What block `index` returned; what it and its like had written is there again."""
        assert self.states is not None
        for mapping, entries in zip(_mappings(args, kwargs), self.shared, strict=True):
            mapping.update(entries)
        return self.returned[index].whole(self.states)


@contextmanager
def recording(blocks: Sequence[nn.Module], take: Callable[[Call], None]) -> Iterator[None]:
    """While a model runs, hand each call of these blocks to `take`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        take(Call(module, args, kwargs, output, [dict(m) for m in _mappings(args, kwargs)]))

    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
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
    alike: _Alike = {}

    def standing_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if verify and not same_call(_kept_of(index, args, kwargs), passed.received[index], alike):
                raise UnlikeError
            return passed.again(index, args, kwargs)

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(_forward_replaced(block, standing_in(index)))
        yield


@contextmanager
def stopping_before(block: nn.Module, received: list[Any]) -> Iterator[None]:
    """End the pass inside before this block runs; `received` gets its arguments."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        received.append((args, kwargs))
        raise StoppedError

    with _forward_replaced(block, forward):
        try:
            yield
        except StoppedError:
            return


def can_replay(blocks: Sequence[nn.Module], run: Callable[[], Tensor], counts: Sequence[int]) -> bool:
    """Whether a pass goes on after its first n blocks, for each n of `counts`, as if they had run.

    `run` is a pass over a few tokens, and returns its last hidden states. Each later pass must call the next
    block with the very arguments of the first, and come to the same end, bit for bit. Only the first pass
    runs blocks: in the others they are replaced.
    """
    calls: list[Call] = []
    with recording(blocks, calls.append):
        end = run()
    if [call.block for call in calls] != list(blocks):
        return False
    passed = Passed()
    for index, call in enumerate(calls):
        if index in counts and not _goes_on(blocks, passed, run, call):
            return False
        passed.add(call)
    with replaying(blocks, passed, verify=False):
        return _same_bits(run(), end)


def _goes_on(blocks: Sequence[nn.Module], passed: Passed, run: Callable[[], Tensor], expected: Call) -> bool:
    """Whether the next block is called as it was when the blocks before it ran."""
    index, received = len(passed.returned), list[_Arguments]()
    try:
        with replaying(blocks[:index], passed, verify=True), stopping_before(blocks[index], received):
            run()
    except UnlikeError:
        return False
    return bool(received) and same_call(received[0], (expected.args, expected.kwargs), {})


@contextmanager
def _forward_replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` on this very module, as libraries put it there; hooks go on as ever."""
    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


def _kept_of(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """A call's arguments, without the hidden states that an earlier block returned."""
    return (args if index == 0 else (None, *args[1:])), kwargs


def _mappings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[MutableMapping[Any, Any]]:
    """The mappings among a block's arguments: what blocks share by writing into it."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]


def same_call(one: _Arguments, other: _Arguments, alike: _Alike) -> bool:
    """Whether two calls of a block had the same arguments, bit for bit."""
    if one[1].keys() != other[1].keys():
        return False
    return _same(one[0], other[0], alike) and all(_same(one[1][k], other[1][k], alike) for k in one[1])


def _same(one: Any, other: Any, alike: _Alike) -> bool:
    """Whether two arguments are the same, bit for bit. What blocks write into mappings is put there again."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        pair = (id(one), id(other))
        if pair not in alike:
            if not _same_bits(one, other):
                return False
            alike[pair] = (one, other)
        return True
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_same(a, b, alike) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and (not isinstance(one, _PLAIN) or one == other)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one is other or bool(torch.equal(one, other))
