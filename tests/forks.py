"""Commands in forks of a process that has torch, transformers and lazarus imported: trials by the hundred.

`python -m lazarus` takes seconds to begin, a fork none. Nothing is computed in the process that forks: the
threads that torch starts do not survive it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

import gc

import gguf  # noqa: F401 - imported here, and not again in each fork
import peft  # noqa: F401
import torch
from transformers.models.llama import modeling_llama  # noqa: F401

import lazarus
from lazarus.cli import main

torch.set_num_threads(1)
for _name in lazarus.__all__:
    getattr(lazarus, _name)  # a lazy name is imported when it is first asked for
gc.freeze()

PAUSE_SECONDS = 0.002
_FAULT_OF_OURS = "fault of lazarus"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    code: int
    """the exit code; minus the signal that ended it"""
    seconds: float
    peak_bytes: int
    out: str
    err: str
    is_late: bool = False
    """whether it was killed because its time was up"""

    @property
    def fault(self) -> str | None:
        """What no input may lead to; None where there is none of it."""
        if self.is_late:
            return f"it hung for {self.seconds:.0f} s"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        if self.code == CRASHED or "Traceback (most recent" in self.err:
            return f"an exception: {self.err.strip()[-300:]}"
        if "unexpected" in self.err and (_FAULT_OF_OURS in self.err or "did not foresee" in self.err):
            return self.err.strip().splitlines()[-1][:300]
        return None


CRASHED = 99


@dataclass
class Trial:
    """A command, or a call, that runs in a fork; it is over when `ended` has been called."""

    pid: int
    out: Path
    err: Path
    started: float = field(default_factory=time.monotonic)
    _usage: tuple[int, resource.struct_rusage] | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def is_over(self) -> bool:
        """Whether the process has ended."""
        if self._usage is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._usage = status, usage
        return self._usage is not None

    def send(self, number: int) -> bool:
        """Send a signal to the process and to what it has started; whether it was still there."""
        if self.is_over():
            return False
        os.killpg(self.pid, number)
        return True

    def ended(self, limit_seconds: float = 60) -> Outcome:
        """Wait for its end; kill it when its time is up."""
        is_late = False
        while not self.is_over():
            if self.seconds > limit_seconds:
                is_late = self.send(signal.SIGKILL)
                limit_seconds = float("inf")
            time.sleep(PAUSE_SECONDS)
        assert self._usage is not None
        status, usage = self._usage
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (self.out, self.err))
        code = os.waitstatus_to_exitcode(status)
        return Outcome(code, self.seconds, usage.ru_maxrss * 1024, out, err, is_late)


def start(
    run: Sequence[object] | Callable[[], None],
    folder: Path,
    *,
    more_bytes: int | None = None,
    before: Callable[[], None] | None = None,
    name: str = "",
) -> Trial:
    """Start a command line, or call a function, in a fork.

    Args:
        run: the arguments of `lazarus`, or the function.
        folder: is made; the process works in it, and has its temporary files in `folder/tmp`.
        more_bytes: the address space that it may take beyond what this process has.
        before: is called in the fork, first.
        name: tells apart processes that share a folder.
    """
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    trial_out, trial_err = (
        Path(tempfile.gettempdir(), f"trial-{os.getpid()}{name}.{end}") for end in ("out", "err")
    )
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with suppress(OSError):  # here too: a signal may be sent before the fork has done it
            os.setpgid(pid, pid)
        return Trial(pid, trial_out, trial_err)
    code = CRASHED
    try:
        os.setpgid(0, 0)
        _connect(trial_out, trial_err)
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if more_bytes is not None:
            _limit(more_bytes)
        if before is not None:
            before()
        code = _called(run)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _connect(out: Path, err: Path) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)


def _limit(more_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _called(run: Sequence[object] | Callable[[], None]) -> int:
    try:
        if callable(run):
            run()
        else:
            sys.argv = ["lazarus", *map(str, run)]
            main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException as error:  # noqa: BLE001 - whatever comes out is what a trial looks for
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def run(
    command: Sequence[object] | Callable[[], None],
    folder: Path,
    *,
    limit_seconds: float = 60,
    more_bytes: int | None = None,
    before: Callable[[], None] | None = None,
) -> Outcome:
    """Run a command line, or call a function, in a fork, and wait for its end. See `start`."""
    return start(command, folder, more_bytes=more_bytes, before=before).ended(limit_seconds)


def emptied(folder: Path) -> Path:
    """Return a folder that is there and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
