"""Temporary folders: nothing is left of them, and nobody else's are touched."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from lazarus.errors import UsageError
from lazarus.recordings import make_folder
from lazarus.recordings.folder import Claim
from lazarus.scratch import ScratchFolder, remove_all


def killed_while(make: type[ScratchFolder] | type[Claim], place: Path) -> None:
    """Kill a process that has made a folder, or claimed one, and has written into it."""
    pid = os.fork()
    if not pid:
        made = make(place)
        path = made.path if isinstance(made, ScratchFolder) else place
        (path / "00000.safetensors.part").write_bytes(b"half")
        time.sleep(60)
        os._exit(1)
    while not list(place.rglob("*.part")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_goes_with_its_context(tmp_path: Path) -> None:
    with ScratchFolder(tmp_path) as folder:
        (folder.path / "states").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_generator_that_was_left_goes_at_the_end(tmp_path: Path) -> None:
    """The trace of an error keeps the frames that the generator is in."""

    def states() -> Generator[int, None, None]:
        with ScratchFolder(tmp_path):
            yield 1

    kept = states()
    next(kept)
    remove_all()
    assert list(tmp_path.iterdir()) == []
    kept.close()


def test_what_a_killed_process_left_goes_with_the_next_folder(tmp_path: Path) -> None:
    killed_while(ScratchFolder, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with ScratchFolder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder.path]
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_in_use_or_of_others_stay(tmp_path: Path) -> None:
    stranger = tmp_path / ".lazarus-mine"
    stranger.mkdir()
    (stranger / "thesis.tex").touch()
    (tmp_path / ".lazarus-link").symlink_to(stranger)
    with ScratchFolder(tmp_path) as one, ScratchFolder(tmp_path) as other:
        assert one.path.exists()
        assert other.path.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lazarus-link", ".lazarus-mine"]


@pytest.fixture(params=["ENOLCK", "EOPNOTSUPP"])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, request.param)

    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", fails)


@pytest.mark.usefixtures("without_locks")
def test_a_disk_without_locks_has_temporary_folders_and_no_dead_ones(tmp_path: Path) -> None:
    with ScratchFolder(tmp_path) as one:
        (one.path / "states").write_text("x")
        with ScratchFolder(tmp_path):
            assert (one.path / "states").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_locks")
def test_on_a_disk_without_locks_no_recording_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "00000.safetensors.part").touch()
    (tmp_path / ".recording").touch()
    with pytest.raises(UsageError):
        make_folder(tmp_path)
    assert (tmp_path / "00000.safetensors.part").exists()


def test_a_recording_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    killed_while(Claim, tmp_path)
    assert make_folder(tmp_path) == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_recording_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with Claim(tmp_path):
        (tmp_path / "00000.safetensors.part").touch()
        with pytest.raises(UsageError, match="another process records into it"):
            make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors.part"]


def test_tensors_of_somebody_else_are_no_half_recording(tmp_path: Path) -> None:
    (tmp_path / "00000.safetensors").touch()
    with pytest.raises(UsageError, match=r"holds '00000\.safetensors'"):
        make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors"]
