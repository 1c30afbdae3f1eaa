"""Hidden states between two blocks: in memory up to a budget, and in temporary files beyond it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lazarus.errors import SaveError
from lazarus.messages import option
from lazarus.scratch import ScratchFolder


class SpillBuffer:
    """Values that hold tensors, by key; whatever does not fit the budget waits in a file of its own.

    A key that was in memory once stays there, and one that was not goes to its file each time: every key
    comes round once a block, so none is worth more than another.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.spilled_bytes = 0
        self._in_memory: dict[Hashable, tuple[Any, int]] = {}
        self._in_files: dict[Hashable, tuple[Any, Path, int]] = {}
        self._folder: ScratchFolder | None = None
        self._used_bytes = 0
        self._names = count()

    def __enter__(self) -> SpillBuffer:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            self._folder.remove()

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value: tensors, in tuples, lists and dicts, and anything else beside them.

        Raises:
            SaveError: the temporary files do not fit the disk.
        """
        tensors: list[Tensor] = []
        shape = _taken_out(value, tensors)
        size = sum(t.numel() * t.element_size() for t in tensors)
        # The old value goes first, so that the new one may take its room.
        old = self._in_memory.pop(key, (None, 0))[1]
        self._used_bytes -= old
        if key not in self._in_files and self._used_bytes + size <= self.budget_bytes:
            self._in_memory[key] = (value, size)
            self._used_bytes += size
            return
        self._write(key, shape, tensors, size)

    def take(self, key: Hashable) -> Any:
        """Return the value that is kept under this key; it stays there."""
        if key in self._in_memory:
            return self._in_memory[key][0]
        shape, path, _ = self._in_files[key]
        found = load_file(path)
        # Into memory of their own: they are views of the file, and less aligned than kernels like.
        return _put_back(shape, [found[str(i)].clone() for i in range(len(found))])

    def __contains__(self, key: object) -> bool:
        return key in self._in_memory or key in self._in_files

    def _write(self, key: Hashable, shape: Any, tensors: list[Tensor], size: int) -> None:
        try:
            if self._folder is None:
                self._folder = ScratchFolder()
            # The same file is written again: what was read from it is a clone by now.
            _, path, before = self._in_files.get(key) or (None, self._folder.path / str(next(self._names)), 0)
            # Clones, because safetensors refuses tensors that share memory.
            save_file({str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(tensors)}, path)
        except (OSError, SafetensorError) as error:
            raise SaveError(
                f"hidden states cannot be written to {tempfile.gettempdir()}: {error}. Make room there, or "
                "set TMPDIR to a larger disk."
            ) from error
        self._in_files[key] = (shape, path, size)
        self.spilled_bytes += size - before


def check_room(n_bytes: int, budget_bytes: int) -> None:
    """Refuse to begin what the temporary files would not hold.

    Raises:
        SaveError: hidden states of `n_bytes` in all, less the budget in memory, do not fit the disk.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if n_bytes - budget_bytes > free:
        raise SaveError(
            f"{option('memory', 'stream')} keeps the hidden states of all prompts between two blocks: "
            f"{_gigabytes(n_bytes)}, of which {_gigabytes(budget_bytes)} fit into memory, and {folder} has "
            f"{_gigabytes(free)} free. Set TMPDIR to a larger disk, give fewer prompts, or split them with "
            f"{option('work_dir')}.",
            option="memory",
        )


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


@dataclass(frozen=True)
class _Place:
    """The place of a tensor."""

    index: int
    device: torch.device


def _taken_out(value: Any, tensors: list[Tensor]) -> Any:
    """The value with a place for each of its tensors, which are appended to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1, value.device)
    # Exact types: a subclass may not be made again from its items, so it stays whole, in memory.
    if type(value) in (tuple, list):
        return type(value)(_taken_out(item, tensors) for item in value)
    if type(value) is dict:
        return {key: _taken_out(item, tensors) for key, item in value.items()}
    return value


def _put_back(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.index].to(value.device)
    if type(value) in (tuple, list):
        return type(value)(_put_back(item, tensors) for item in value)
    if type(value) is dict:
        return {key: _put_back(item, tensors) for key, item in value.items()}
    return value
