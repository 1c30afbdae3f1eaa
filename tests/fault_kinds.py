"""The faults of `make faults`: each kind is a generator of trials."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fault_ground import Ground, Job, differing, is_there, read_product
from forks import Outcome, Trial, emptied, run, start

SAVING = (
    "activation-diff",
    "--work-dir",
    "--memory stream",
    "weight-diff",
    "compare",
    "series",
    "record",
    "html",
)
READING = ("activation-diff", "--memory stream", "weight-diff", "compare", "series", "record")


@dataclass(frozen=True)
class Told:
    """One trial: its fault, what came of it in a word or two, and what was wrong."""

    fault: str
    what: str
    complaints: list[str] = field(default_factory=list)


Kind = Callable[[Ground, int, random.Random], Iterator[Told]]


def _in_some_order(names: Sequence[str], dice: random.Random) -> list[str]:
    return dice.sample(names, len(names))


def word_for(outcome: Outcome) -> str:
    """What happened, in a word or two."""
    if outcome.code < 0:
        return f"ended by {signal.Signals(-outcome.code).name}"
    return {0: "a right result", 1: "refused", 2: "refused"}.get(outcome.code, f"exit {outcome.code}")


# --- signals ------------------------------------------------------------------------------------


def killed(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    """SIGKILL at a random moment; what is left over is gone when the same command has run again."""
    yield from _signalled(ground, n_trials, dice, signal.SIGKILL)


def interrupted(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    yield from _signalled(ground, n_trials, dice, signal.SIGINT)


def terminated(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    yield from _signalled(ground, n_trials, dice, signal.SIGTERM)


def hung_up(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    yield from _signalled(ground, n_trials, dice, signal.SIGHUP)


def _signalled(ground: Ground, n_trials: int, dice: random.Random, number: signal.Signals) -> Iterator[Told]:
    names = _in_some_order(SAVING, dice)
    n_sent = i = 0
    while n_sent < n_trials and i < 3 * n_trials:  # a process that was done before is no trial of the signal
        job = ground.jobs[names[i % len(names)]]
        i += 1
        ground.know([job.name])
        folder = emptied(ground.root / "trial")
        trial = start(job.arguments, folder, before=job.before)
        moment = dice.uniform(0, ground.seconds[job.name])
        while not trial.is_over() and trial.seconds < moment:
            time.sleep(0.001)
        n_sent += trial.send(number)
        outcome = trial.ended()
        told = _after_a_signal(ground, job, folder, outcome, number, is_early=moment < 0.1)
        yield Told(f"{number.name}, {job.name}", word_for(outcome), told + ground.next_run(job, folder))


def _after_a_signal(
    ground: Ground, job: Job, folder: Path, outcome: Outcome, number: signal.Signals, *, is_early: bool
) -> list[str]:
    # Before the command has begun, a signal does what it does to any process.
    meant = {128 + number} | ({-number} if is_early or number == signal.SIGKILL else set())
    complaints = ground.complaints(job, folder, outcome, meant=meant)
    if outcome.code not in {0, *meant}:
        complaints.append(f"exit {outcome.code} after {number.name}: {outcome.err.strip()[-200:]}")
    if number != signal.SIGKILL:
        complaints += map("left: {}".format, ground.leftovers(job, folder))
    return complaints


# --- disks --------------------------------------------------------------------------------------


def disk_full(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    """Every file is cut at so many bytes: from none at all to one byte less than the largest one has."""
    names = _in_some_order(SAVING, dice)
    n_steps = -(-n_trials // len(names))
    for i in range(n_trials):
        job = ground.jobs[names[i % len(names)]]
        ground.know([job.name])
        most = ground.largest[job.name] * (i // len(names)) // n_steps
        folder = emptied(ground.root / "trial")
        outcome = _with_files_of_at_most(most, job, folder)
        yield _after_a_full_disk(ground, job, folder, outcome, f"files of at most N bytes, {job.name}")


def _with_files_of_at_most(most: int, job: Job, folder: Path) -> Outcome:
    # Standard error is a pipe: the limit holds for files.
    told, telling = os.pipe()

    def limit() -> None:
        if job.before:
            job.before()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as on a full disk
        sys.stdout, sys.stderr = (os.fdopen(os.dup(telling), "w", buffering=1) for _ in range(2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    outcome = run(job.arguments, folder, before=limit)
    os.close(telling)
    with os.fdopen(told, errors="replace") as stream:
        return replace(outcome, err=stream.read())


def _after_a_full_disk(ground: Ground, job: Job, folder: Path, outcome: Outcome, fault: str) -> Told:
    complaints = ground.complaints(job, folder, outcome)
    complaints += map("left: {}".format, ground.leftovers(job, folder))
    return Told(fault, word_for(outcome), complaints + ground.next_run(job, folder))


def small_disk(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    """A disk of its own, with room for so many pages; root alone may mount it."""
    names = _in_some_order(SAVING, dice)
    place = ground.root / "disk"
    place.mkdir(exist_ok=True)
    for i in range(n_trials):
        job = ground.jobs[names[i % len(names)]]
        ground.know([job.name])
        kilobytes = 1100 + 4 * (i // len(names)) ** 2 * 8
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "lazarus-faults", str(place)]
        if subprocess.run(mount, capture_output=True).returncode:
            yield Told("a small disk", "not tried: it takes root")
            return
        try:
            folder = emptied(place / "trial")
            outcome = run(job.arguments, folder, before=job.before)
            complaints = ground.complaints(job, folder, outcome)
            complaints += map("left: {}".format, ground.leftovers(job, folder))
            subprocess.run([*mount[:3], "-o", "remount,size=1g", *mount[5:]], check=True)
            yield Told(
                f"a disk that is full, {job.name}",
                word_for(outcome),
                complaints + ground.next_run(job, folder),
            )
        finally:
            subprocess.run(["umount", str(place)], check=True)


# --- files that change while they are read ------------------------------------------------------


def _overwrite(path: Path, other: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(other.read_bytes())


def _replace(path: Path, other: Path) -> None:
    part = path.with_name("coming")
    shutil.copy(other, part)
    part.replace(path)


def _cut(path: Path, _other: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def _remove(path: Path, _other: Path) -> None:
    path.unlink()


CHANGES: dict[str, Callable[[Path, Path], None]] = {
    "overwritten": _overwrite,
    "replaced": _replace,
    "cut short": _cut,
    "removed": _remove,
}


def changed(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    """The base's weights change at a random moment: a result is of the one state, or of the other."""
    original = ground.base / "model.safetensors"
    kept = ground.root / "kept.safetensors"
    if not kept.exists():
        shutil.copy(original, kept)
    names = _in_some_order(READING, dice)
    for i in range(n_trials):
        job = ground.jobs[names[i % len(names)]]
        name = (
            list(CHANGES)[i // len(names) % len(CHANGES)]
            if n_trials > len(names)
            else dice.choice([*CHANGES])
        )
        ground.know([job.name])
        if job.name not in ground.of_the_other_state:
            _replace(original, ground.finetuned / "model.safetensors")
            ground.of_the_other_state[job.name] = ground.undisturbed(job)
            _replace(original, kept)
        folder = emptied(ground.root / "trial")
        trial = start(job.arguments, folder, before=job.before)
        moment = dice.uniform(0, ground.seconds[job.name])
        while not trial.is_over() and trial.seconds < moment:
            time.sleep(0.001)
        CHANGES[name](original, ground.finetuned / "model.safetensors")
        outcome = trial.ended()
        _replace(original, kept)
        complaints = [outcome.fault] if outcome.fault else []
        if is_there(folder / job.product):
            found = read_product(folder / job.product)
            states = ground.expected[job.name], ground.of_the_other_state[job.name]
            wrong = [differing(found, state) for state in states]
            if all(wrong):
                complaints.append(f"a result of neither state: {wrong}")
        complaints += map("left: {}".format, ground.leftovers(job, folder))
        yield Told(f"weights {name} while read, {job.name}", word_for(outcome), complaints)


# --- memory -------------------------------------------------------------------------------------


def little_address_space(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    """So much address space, and no more (RLIMIT_AS): a result, or a message."""
    names = _in_some_order(SAVING, dice)
    for i in range(n_trials):
        job = ground.jobs[names[i % len(names)]]
        ground.know([job.name])
        folder = emptied(ground.root / "trial")
        megabytes = 2 + 12 * (i // len(names))
        outcome = run(job.arguments, folder, more_bytes=megabytes * 2**20, before=job.before)
        complaints = ground.complaints(job, folder, outcome)
        complaints += map("left: {}".format, ground.leftovers(job, folder))
        yield Told(f"little memory, {job.name}", word_for(outcome), complaints)


# --- ranks --------------------------------------------------------------------------------------


def rank_dies(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    """One of two processes that share a run is killed, or stopped for a while; the other one ends rightly."""
    job = ground.jobs["--work-dir"]
    ground.know([job.name])
    for i in range(n_trials):
        stopped = bool(i % 2)
        folder = emptied(ground.root / "trial")
        trials = [_rank(job, folder, rank) for rank in range(2)]
        victim = i // 2 % 2
        moment = dice.uniform(0, 1.5 * ground.seconds[job.name])
        while trials[victim].seconds < moment and not trials[victim].is_over():
            time.sleep(0.001)
        if stopped and trials[victim].send(signal.SIGSTOP):
            time.sleep(1)
            trials[victim].send(signal.SIGCONT)
        elif not stopped:
            trials[victim].send(signal.SIGKILL)
        outcomes = [trial.ended() for trial in trials]
        complaints = [told for o in outcomes if o.code != -signal.SIGKILL and (told := o.fault)]
        complaints += ground.complaints(job, folder, outcomes[0], meant=(-signal.SIGKILL,))
        what = "stopped for a second" if stopped else "killed"
        yield Told(
            f"rank {victim} of 2 is {what}", word_for(outcomes[0]), complaints + ground.next_run(job, folder)
        )


def _rank(job: Job, folder: Path, number: int) -> Trial:
    def before() -> None:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}

    return start(job.arguments, folder, before=before, name=f"rank{number}")


# --- surroundings -------------------------------------------------------------------------------


def _without_home() -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "USER", "LOGNAME"):
        os.environ.pop(name, None)


def _with_a_home_that_is_not_there() -> None:
    os.environ["HOME"] = "/nonexistent"


def _with_a_home_of_no_room() -> None:
    os.environ |= {
        "HOME": "/proc",
        "HF_HOME": "/proc/hf",
        "XDG_CACHE_HOME": "/proc/cache",
        "MPLCONFIGDIR": "/proc/m",
    }


def _without(*numbers: int) -> Callable[[], None]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


def _with_streams_in_ascii() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]
    os.environ |= {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}


SURROUNDINGS: dict[str, Callable[[], None]] = {
    "no HOME": _without_home,
    "a HOME that is not there": _with_a_home_that_is_not_there,
    "caches that cannot be written": _with_a_home_of_no_room,
    "standard input closed": _without(0),
    "standard output closed": _without(1),
    "standard error closed": _without(2),
    "all three closed": _without(0, 1, 2),
    "an ASCII locale": _with_streams_in_ascii,
}


def surroundings(ground: Ground, n_trials: int, dice: random.Random) -> Iterator[Told]:
    """Whatever is missing around the process, the result is right and is saved."""
    each: Sequence[tuple[str, str]] = [(name, job) for name in SURROUNDINGS for job in SAVING]
    for name, job_name in dice.sample(each, min(n_trials, len(each))):
        job = ground.jobs[job_name]
        ground.know([job_name])
        folder = emptied(ground.root / "trial")
        outcome = run(job.arguments, folder, before=SURROUNDINGS[name])
        complaints = ground.complaints(job, folder, outcome)
        if not is_there(folder / job.product):
            complaints.append(f"no result, exit {outcome.code}: {outcome.err.strip()[-200:]}")
        complaints += map("left: {}".format, ground.leftovers(job, folder))
        yield Told(f"{name}, all commands", word_for(outcome), complaints)


KINDS: dict[str, tuple[Kind, int]] = {
    "sigkill": (killed, 200),
    "sigint": (interrupted, 80),
    "sigterm": (terminated, 80),
    "sighup": (hung_up, 40),
    "disk-full": (disk_full, 80),
    "small-disk": (small_disk, 80),
    "changed": (changed, 120),
    "memory": (little_address_space, 80),
    "ranks": (rank_dies, 20),
    "surroundings": (surroundings, 64),
}
"""Each kind, and how many trials it has by default."""
