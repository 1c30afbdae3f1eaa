"""Free memory, and whether two models fit into it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 2**60
"""cgroups of version 1 say "no limit" by a number about as large as fits."""


def free_bytes(device: torch.device) -> int:
    """The memory that can still be taken on a device, in bytes; of the CPU, within the cgroup's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limits = [limit - used for limit, used in _limits(MEMBERSHIP, CGROUPS)]
    return max(0, min([free, *limits]))


def _limits(membership: Path, root: Path) -> list[tuple[int, int]]:
    """The limit and the use, in bytes, of each cgroup that this process is in, from its own up to the root.

    Use is anonymous memory. The kernel counts cached pages of files as well, but frees them
    when memory is short.
    """
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "memory":
            top, limit, stat = root / "memory", "memory.limit_in_bytes", "total_rss"
        elif not controllers:
            top, limit, stat = root, "memory.max", "anon"
        else:
            continue
        own = top / place.lstrip("/")
        # A limit of any group above holds for this one as well.
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and (read := _read(folder, limit, stat)) is not None:
                found.append(read)
    return found


def _read(folder: Path, limit_name: str, stat_name: str) -> tuple[int, int] | None:
    """A cgroup's limit and use; None where it has no limit, or does not exist here."""
    try:
        limit = (folder / limit_name).read_text(encoding="ascii").strip()
        stats = (folder / "memory.stat").read_text(encoding="ascii").split()
    except OSError:  # a container sees its own cgroup as the root
        return None
    if limit == "max" or int(limit) >= UNLIMITED:
        return None
    values = dict(zip(stats[::2], stats[1::2], strict=True))
    return int(limit), int(values.get(stat_name, 0))


def give_back() -> None:
    """Return freed memory to the system, which the C library of Linux would keep for later otherwise."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
