"""How much memory is free: what the machine has, within the limits of the cgroups around the process."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from lazarus.models import room

GIB = 2**30


def make_cgroup(folder: Path, limit_name: str, limit: str, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n", encoding="ascii")
    (folder / "memory.stat").write_text(f"cache 900000000\n{stat}\n", encoding="ascii")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(room, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(room, "MEMBERSHIP", tmp_path / "cgroup")
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
