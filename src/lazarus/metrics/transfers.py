"""From a device to the host, and back: of many sites together, because the host waits each time.

What an accumulator keeps is on the host, and what it adds up is made on the device. So its update is a
generator: it yields tensors of the device, and goes on when it is sent the same on the host. Updates of many
sites go on together, and what all of them ask for next comes in one copy a dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, MutableMapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

Update = Generator[Sequence[Tensor], Sequence[Tensor], T]
"""the update of an accumulator: yields tensors, and is sent the same in the host's memory"""

PENDING_BYTES = 2**28
"""What the rows of updates that wait for each other may take on a device in float64: then they are done."""


class Together:
    """Updates that wait for each other. Those of rows on the CPU are done at once: no wait is to be saved."""

    def __init__(self) -> None:
        self._updates: list[Update[Any]] = []
        self._n_bytes = 0

    def add(self, update: Update[Any], *rows: Tensor) -> None:
        """Take an update of these rows."""
        self._updates.append(update)
        # Each state in float64, and its direction.
        self._n_bytes += sum(2 * 8 * each.numel() for each in rows)
        if self._n_bytes > PENDING_BYTES or all(each.device.type == "cpu" for each in rows):
            self.finish()

    def finish(self) -> None:
        """Do all that wait."""
        updates, self._updates, self._n_bytes = self._updates, [], 0
        do_together(updates)


def do_together(updates: Iterable[Update[Any]]) -> None:
    """Do updates, each in its turn from one transfer to the next."""
    waiting = [(update, asked) for update in updates if (asked := next(update, None)) is not None]
    while waiting:
        told = iter(on_host([tensor for _, asked in waiting for tensor in asked]))
        still = []
        for update, asked in waiting:
            try:
                still.append((update, update.send([next(told) for _ in asked])))
            except StopIteration:
                continue
        waiting = still


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in the host's memory; those of one dtype come from a device in one copy."""
    found, alike = list(tensors), dict[tuple[torch.device, torch.dtype], list[int]]()
    for i, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            alike.setdefault((tensor.device, tensor.dtype), []).append(i)
    for places in alike.values():
        flat = torch.cat([tensors[i].reshape(-1) for i in places]).cpu()
        parts = torch.split(flat, [tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            found[i] = part.view(tensors[i].shape)
    return found


_COPIES: MutableMapping[Tensor, dict[torch.device, Tensor]] = WeakTensorKeyDictionary()
"""of tensors on the host, their copies on devices; forgotten with them"""


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host, such as an index, on a device. It is copied once, so it may not change."""
    if tensor.device == device:
        return tensor
    copies = _COPIES.setdefault(tensor, {})
    if device not in copies:
        copies[device] = tensor.to(device)
    return copies[device]


class OncePerBatch(Generic[T]):
    """Makes something of the prompts that the rows of a batch belong to, once for all sites.

    A batch is told by the very tensor that names its prompts. What is made may not hold that tensor.
    """

    def __init__(self, make: Callable[[Tensor], T]) -> None:
        self._make = make
        self._made: MutableMapping[Tensor, T] = WeakTensorKeyDictionary()

    def __call__(self, prompts: Tensor) -> T:
        """Return what is made of these prompts."""
        if prompts not in self._made:
            self._made[prompts] = self._make(prompts)
        return self._made[prompts]
