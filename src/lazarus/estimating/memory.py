"""The peak of this process's memory, and since when it runs."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_UNIT = 1 if sys.platform == "darwin" else 1024
"""what `getrusage` counts memory in"""
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"


def reset_peak(device: torch.device) -> bool:
    """Forget the peak until now, of this process and of a GPU; return whether the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:  # no Linux, or a container that does not allow it
        return False
    return True


def peak_bytes() -> int:
    """Return the peak of the memory that this process has held: its resident set, with pages of files."""
    with suppress(OSError):  # no Linux
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        if told := next((line for line in lines if line.startswith("VmHWM:")), None):
            return int(told.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def device_peak(device: torch.device) -> int | None:
    """Return the peak of the memory that this process has held on a GPU; None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def since_start() -> float:
    """Return for how many seconds this process runs."""
    return time.time() - psutil.Process().create_time()
