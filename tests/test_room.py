"""How much memory is free: what the machine has, within the limits of the cgroups around the process."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import pytest
import torch

import lazarus
from lazarus import demo, memory
from lazarus.blame import MemoryFaults
from lazarus.errors import DeviceError
from lazarus.models import room

GIB = 2**30


def make_cgroup(folder: Path, limit_name: str, limit: str, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n", encoding="ascii")
    (folder / "memory.stat").write_text(f"cache 900000000\n{stat}\n", encoding="ascii")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "cgroup")
    return tmp_path


def free() -> int:
    return room.free_bytes(torch.device("cpu"))


def test_version_1_counts_what_is_not_a_cache_of_files(places: Path) -> None:
    (places / "cgroup").write_text("4:memory:/jobs/7\n3:cpuset:/\n", encoding="ascii")
    own = places / "fs" / "memory" / "jobs" / "7"
    make_cgroup(own, "memory.limit_in_bytes", str(GIB // 2), "total_rss 1048576")
    assert free() == GIB // 2 - 2**20


def test_version_2_takes_the_narrowest_of_all_levels(places: Path) -> None:
    (places / "cgroup").write_text("0::/user/job\n", encoding="ascii")
    make_cgroup(places / "fs" / "user" / "job", "memory.max", "max", "anon 5")
    make_cgroup(places / "fs" / "user", "memory.max", str(GIB // 4), "anon 100")
    assert free() == GIB // 4 - 100


def test_no_limit_is_what_the_machine_has(places: Path) -> None:
    (places / "cgroup").write_text("4:memory:/a\n0::/\n", encoding="ascii")
    make_cgroup(places / "fs" / "memory" / "a", "memory.limit_in_bytes", "9223372036854771712", "total_rss 1")
    assert free() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_system_without_cgroups_is_what_the_machine_has(places: Path) -> None:
    assert free() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_cgroup_that_is_used_up_leaves_nothing(places: Path) -> None:
    (places / "cgroup").write_text("0::/\n", encoding="ascii")
    make_cgroup(places / "fs", "memory.max", str(2**20), f"anon {2**21}")
    assert free() == 0


@pytest.mark.parametrize(
    ("kind", "name", "column"), [("RLIMIT_AS", "ulimit -v", 0), ("RLIMIT_DATA", "ulimit -d", 5)]
)
def test_a_limit_of_the_shell_counts_what_the_process_has(
    kind: str, name: str, column: int, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = places / "statm"
    sizes.write_text("1000 200 30 4 0 500 0\n", encoding="ascii")
    monkeypatch.setattr(memory, "SIZES", sizes)
    limits = {getattr(resource, kind): GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY),) * 2)
    used = (1000 if column == 0 else 500) * resource.getpagesize()
    found = memory.tightest_limit()
    assert found is not None
    assert (found.left, str(found)) == (GIB - used, f"{name}'s limit of 1.07 GB")
    assert free() == GIB - used


# --- Refused before it begins


def limit_to(places: Path, left: int) -> None:
    (places / "cgroup").write_text("0::/\n", encoding="ascii")
    make_cgroup(places / "fs", "memory.max", str(GIB + left), f"anon {GIB}")


@pytest.mark.parametrize("mode", ["auto", "resident", "stream"])
def test_a_pair_that_a_limit_does_not_hold_is_refused(mode: str, places: Path) -> None:
    """The system would kill the process without a word."""
    limit_to(places, 2**20)
    with pytest.raises(DeviceError) as caught:
        lazarus.activation_diff(demo.BASE, demo.FINETUNED, ["Hello"], memory=mode)
    told = str(caught.value)
    assert told.startswith("Both models take 0.0")
    assert "and 0.00 GB are left of the cgroup's limit of 1.07 GB. Use `dtype=" in told
    assert "memory=" not in told  # it would not help


def test_compare_is_refused_as_well(places: Path) -> None:
    limit_to(places, 2**20)
    with pytest.raises(DeviceError, match=r"Both models take .* the cgroup's limit of 1.07 GB. Use `dtype="):
        lazarus.compare(demo.BASE, demo.FINETUNED, "Hello")


def test_memory_that_runs_out_within_a_limit_names_it(places: Path) -> None:
    limit_to(places, GIB)
    with pytest.raises(DeviceError) as caught, MemoryFaults(["A"]):
        raise MemoryError
    assert str(caught.value) == "Out of memory, within the cgroup's limit of 2.15 GB. Use A."
