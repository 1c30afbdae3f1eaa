"""The limits of this process's memory that are known before it runs out: those of cgroups and ulimit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
SIZES = Path("/proc/self/statm")
UNLIMITED = 2**60
"""cgroups of version 1 say "no limit" by a number about as large as fits."""


@dataclass(frozen=True)
class Limit:
    """A limit in bytes, how much of it is used, and whose it is."""

    n_bytes: int
    used: int
    name: str

    @property
    def left(self) -> int:
        """Return how many bytes can still be taken."""
        return max(0, self.n_bytes - self.used)

    def __str__(self) -> str:
        return f"{self.name}'s limit of {self.n_bytes / 1e9:.2f} GB"


def tightest_limit() -> Limit | None:
    """Return the limit of which the least is left; None where there is none."""
    return min((*_of_cgroups(), *_of_process()), key=lambda limit: limit.left, default=None)


def _of_cgroups() -> Iterator[Limit]:
    """Yield the limit and the use of each cgroup that this process is in, from its own up to the root.

    Use is anonymous memory. The kernel counts cached pages of files as well, but frees them
    when memory is short.
    """
    try:
        lines = MEMBERSHIP.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):  # no Linux
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "memory":
            top, limit, stat = CGROUPS / "memory", "memory.limit_in_bytes", "total_rss"
        elif not controllers:
            top, limit, stat = CGROUPS, "memory.max", "anon"
        else:
            continue
        own = top / place.lstrip("/")
        # A limit of any group above holds for this one as well.
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and (found := _read(folder, limit, stat)) is not None:
                yield found


def _read(folder: Path, limit_name: str, stat_name: str) -> Limit | None:
    """Return a cgroup's limit; None where it has none, or does not exist here."""
    try:
        limit = (folder / limit_name).read_text(encoding="ascii").strip()
        stats = (folder / "memory.stat").read_text(encoding="ascii").split()
    except OSError:  # a container sees its own cgroup as the root
        return None
    if limit == "max" or int(limit) >= UNLIMITED:
        return None
    values = dict(zip(stats[::2], stats[1::2], strict=True))
    return Limit(int(limit), int(values.get(stat_name, 0)), "the cgroup")


def _of_process() -> Iterator[Limit]:
    """Yield the limits of `ulimit -v`, in which mapped files count, and of `ulimit -d`."""
    try:
        import resource

        pages = SIZES.read_text(encoding="ascii").split()
    except (ImportError, OSError):  # no Linux
        return
    for kind, name, column in ((resource.RLIMIT_AS, "ulimit -v", 0), (resource.RLIMIT_DATA, "ulimit -d", 5)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield Limit(limit, int(pages[column]) * os.sysconf("SC_PAGE_SIZE"), name)
