"""Free memory on a device, and giving back what was freed."""

from __future__ import annotations

import ctypes
import sys

import psutil
import torch

from lazarus.memory import tightest_limit


def free_bytes(device: torch.device) -> int:
    """The memory that can still be taken on a device, in bytes; of the CPU, within the process's limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free, limit = int(psutil.virtual_memory().available), tightest_limit()
    return free if limit is None else min(free, limit.left)


def give_back() -> None:
    """Return freed memory to the system, which the C library of Linux would keep for later otherwise."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
