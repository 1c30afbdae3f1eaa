"""Tests in forks of a process that has torch already: on each mutant, and which lines they run.

A mutant of a function needs no import: the function's code is put in the place of the code that the tests
found. What runs when a module is imported is imported anew. The files of the checkout are never changed, so
a test that starts a process of its own tests the module as it is.
"""

from __future__ import annotations

import builtins
import gc
import hashlib
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import SourceFileLoader
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from benchmarks import places
from benchmarks.mutations import Mutant, with_hits

SOURCE = places.ROOT / "src" / "lazarus"
TESTS = places.ROOT / "tests"
SKIPPED = ("browser", "site", "notebook", "real", "docs")
"""Test files with one of these in their names are left out: slow, and of no use against these mutants."""
OPTIONS = [
    *("-q", "-s", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--rootdir={places.ROOT}"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # plug-ins that the forks have already
]
PATIENCE = 15
"""A test may take so many times its time before it counts as endless, and"""
GRACE_SECONDS = 40
IMPORT_SECONDS = 60
FILE_SECONDS = 3600
DAY_SECONDS = 86400
_HIT = "__lazarus_hit__"

Lines = dict[str, list[int]]


class Test(Struct, frozen=True):
    """A test that passes, and the lines of each module at which its statements begin."""

    id: str
    seconds: float
    lines: Lines

    @property
    def file(self) -> str:
        """The file that holds it."""
        return self.id.split("::")[0]


class TestFile(Struct, frozen=True):
    """The tests of a file, and the file and the modules as they were then."""

    stamp: str
    modules: dict[str, str]
    tests: list[Test]


class Ran(Struct, frozen=True):
    """The outcome of a mutant."""

    killed_by: str = ""
    """a test, "time", "crash" or "import"; empty where it survived"""
    n_tests: int = 0
    seconds: float = 0.0


@dataclass(eq=False)  # pytest keeps plug-ins in sets
class _Loop:
    """A pytest plug-in that collects as ever and then does `work` in the place of running."""

    work: Callable[[_Loop, pytest.Session], None]
    failed: bool = False
    skipped: bool = False
    hits: list[set[tuple[str, int]]] = field(default_factory=lambda: [set()])
    """the lines that were run, innermost fixture last"""
    shared: dict[int, set[tuple[str, int]]] = field(default_factory=lambda: defaultdict(set))
    """those of each fixture, which every test that has it depends on"""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Do the work."""
        gc.collect()
        gc.freeze()  # so that the forks share what is there
        self.work(self, session)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        """Take down which lines a fixture runs, whichever test asks for it first."""
        self.hits.append(set())
        try:
            return (yield)
        finally:
            found = self.hits.pop()
            self.shared[id(fixturedef)] |= found
            self.hits[-1] |= found

    def lines_of(self, item: pytest.Item) -> set[tuple[str, int]]:
        """Return the lines that a test ran, and its fixtures."""
        known = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
        fixtures = (self.shared[id(found)] for name in known for found in known[name])
        return self.hits[0].union(*fixtures)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Learn how a test went."""
        self.failed |= report.failed
        self.skipped |= report.skipped

    def passes(self, item: pytest.Item, following: pytest.Item | None) -> bool:
        """Run one test."""
        self.failed = self.skipped = False
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return not self.failed


def in_fork(work: Callable[[], Any], seconds: float) -> bytes | None:
    """Run work in a fork and return what it does, as JSON: empty where it died, None out of time."""
    reader, writer = os.pipe()
    folder = tempfile.mkdtemp(prefix="mutant-")
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            found = msgspec.json.encode(work()) + b"\n"
            with open(writer, "wb") as stream:
                stream.write(found)
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    os.setpgid(pid, pid)  # as the fork does: whichever comes first
    try:
        return _read(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _read(reader: int, deadline: float) -> bytes | None:
    found = b""
    while not found.endswith(b"\n"):
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(reader, 1 << 20)
        if not part:
            return b""
        found += part
    return found


def _overlay(sources: Mapping[Path, str]) -> None:
    """Import these files from the given sources, and from no bytecode."""
    texts = {str(path): text.encode() for path, text in sources.items()}
    read, stats = SourceFileLoader.get_data, SourceFileLoader.path_stats

    def get_data(loader: SourceFileLoader, path: str) -> bytes:
        return texts[path] if path in texts else read(loader, path)

    def path_stats(loader: SourceFileLoader, path: str) -> Mapping[str, Any]:
        if path in texts:
            raise OSError  # so a loader knows that there is no bytecode
        return stats(loader, path)

    setattr(SourceFileLoader, "get_data", get_data)  # noqa: B010
    setattr(SourceFileLoader, "path_stats", path_stats)  # noqa: B010


# --- which tests run which lines ----------------------------------------------------------------


def learn_tests(
    modules: Sequence[str],
    needed: Sequence[str],
    told: Callable[[str], None],
    chosen: Collection[str] | None = None,
) -> list[Test]:
    """Every test that passes, with the lines of the modules that it runs; of the `chosen` files alone.

    What was learnt before is kept where neither the test's file nor a module that is `needed` has changed.
    Whatever else has changed may have made a test fail: without the cache, all is learnt anew.
    """
    sources = {module: (SOURCE / module).read_text(encoding="utf-8") for module in modules}
    files = [path for path in sorted(TESTS.glob("test_*.py")) if not any(s in path.stem for s in SKIPPED)]
    files = [path for path in files if chosen is None or path.stem in chosen]
    stamps = {module: _stamp(text) for module, text in sources.items()}
    kept = {path: _kept(path, {module: stamps[module] for module in needed}) for path in files}
    missing = [path for path, found in kept.items() if found is None]
    if missing:
        in_fork(lambda: _learn(missing, sources, told), DAY_SECONDS)
        kept |= {path: _kept(path, stamps) for path in missing}
    return [test for found in kept.values() if found is not None for test in found.tests]


def _stamp(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cache(path: Path) -> Path:
    return places.MUTANTS_CACHE / "tests" / f"{path.name}.json"


def _kept(path: Path, stamps: Mapping[str, str]) -> TestFile | None:
    if not _cache(path).exists():
        return None
    found = msgspec.json.decode(_cache(path).read_bytes(), type=TestFile)
    same = found.stamp == _stamp(path.read_text(encoding="utf-8")) and stamps.items() <= found.modules.items()
    return found if same else None


def _learn(files: Sequence[Path], sources: Mapping[str, str], told: Callable[[str], None]) -> None:
    _overlay({SOURCE / module: with_hits(text, module, _HIT) for module, text in sources.items()})
    setattr(builtins, _HIT, lambda module, line: None)
    _cache(TESTS).parent.mkdir(parents=True, exist_ok=True)
    stamps = {module: _stamp(text) for module, text in sources.items()}

    def work(loop: _Loop, session: pytest.Session) -> None:
        of_file: dict[Path, list[pytest.Item]] = defaultdict(list)
        for item in session.items:
            of_file[item.path].append(item)
        for path, items in of_file.items():
            started = time.monotonic()
            found = in_fork(partial(_lines, loop, items), FILE_SECONDS)
            tests, n_failed = msgspec.json.decode(found, type=tuple[list[Test], int]) if found else ([], -1)
            learnt = TestFile(_stamp(path.read_text(encoding="utf-8")), stamps, tests)
            _cache(path).write_bytes(msgspec.json.encode(learnt))
            seconds = time.monotonic() - started
            told(f"{path.name}: {len(tests)} of {len(items)} tests, {n_failed} fail, {seconds:.0f} s")

    _session([str(path) for path in files], work)


def _lines(loop: _Loop, items: Sequence[pytest.Item]) -> tuple[list[Test], int]:
    """Return the tests of one file that pass and run a line, and how many fail."""
    found, n_failed = [], 0
    setattr(builtins, _HIT, lambda module, line: loop.hits[-1].add((module, line)))
    for item, following in zip_longest(items, items[1:]):
        loop.hits = [set()]
        started = time.perf_counter()
        passed = loop.passes(item, following)
        seconds = time.perf_counter() - started
        lines: Lines = defaultdict(list)
        for module, line in sorted(loop.lines_of(item)):
            lines[module].append(line)
        n_failed += not passed
        if passed and not loop.skipped and lines:
            found.append(Test(item.nodeid, seconds, lines))
    return found, n_failed


# --- on a mutant --------------------------------------------------------------------------------

Pick = Callable[[Mutant], Sequence[Test]]
Record = Callable[[Mutant, Ran], None]


def run_swapped(mutants: Sequence[Mutant], pick: Pick, record: Record) -> None:
    """Run its tests on each mutant of a function, in forks of one session; some cannot be swapped."""

    def work(loop: _Loop, session: pytest.Session) -> None:
        items = {item.nodeid: item for item in session.items}
        functions = _functions()
        for mutant in mutants:
            found, tests = functions.get(_name(mutant), []), pick(mutant)
            if code := _code(mutant, found):
                trial, plain = (partial(_on_code, loop, items, code, swapped) for swapped in (found, []))
                record(mutant, _ran(tests, trial, plain, fails))

    fails: dict[str, bool] = {}
    files = sorted({str(places.ROOT / test.file) for mutant in mutants for test in pick(mutant)})
    in_fork(lambda: _session(files, work), DAY_SECONDS)


def run_imported(mutants: Sequence[Mutant], pick: Pick, record: Record) -> None:
    """Run its tests on each mutant, imported in the place of its module."""
    fails: dict[str, bool] = {}
    for mutant in mutants:
        trial = partial(_on_import, {SOURCE / mutant.module: mutant.source})
        record(mutant, _ran(pick(mutant), trial, partial(_on_import, {}), fails, IMPORT_SECONDS))


def _on_import(sources: Mapping[Path, str], tests: Sequence[Test]) -> str:
    killers: list[str] = []

    def work(loop: _Loop, session: pytest.Session) -> None:
        items = {item.nodeid: item for item in session.items}
        complete = not session.testsfailed and all(test.id in items for test in tests)
        killers.append(_first_failure(loop, [items[test.id] for test in tests]) if complete else "import")

    _overlay(sources)
    _session(sorted({str(places.ROOT / test.file) for test in tests}), work)
    return killers[0] if killers else "import"


def _session(files: Sequence[str], work: Callable[[_Loop, pytest.Session], None]) -> None:
    log = os.open(places.MUTANTS_CACHE / "last.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    pytest.main([*OPTIONS, *files], plugins=[_Loop(work)])


def _ran(
    tests: Sequence[Test],
    trial: Callable[[Sequence[Test]], str],
    plain: Callable[[Sequence[Test]], str],
    fails: dict[str, bool],
    more_seconds: float = 0.0,
) -> Ran:
    """Run a trial in a fork: whatever ends it but its last line has killed the mutant.

    A test that kills for the first time is also run without the mutant (`plain`): one that fails then too
    is of no use, and `fails` keeps which.
    """
    started = time.monotonic()
    while True:
        sound = [test for test in tests if not fails.get(test.id)]
        patience = GRACE_SECONDS + PATIENCE * sum(test.seconds for test in sound) + more_seconds
        found = in_fork(partial(trial, sound), patience) if sound else b'""'
        killer = "time" if found is None else msgspec.json.decode(found, type=str) if found else "crash"
        suspect = [test for test in sound if test.id == killer and killer not in fails]
        if suspect:
            fails[killer] = in_fork(partial(plain, suspect), patience) != b'""\n'
        if not fails.get(killer):
            return Ran(killer, len(sound), round(time.monotonic() - started, 2))


def _first_failure(loop: _Loop, items: Sequence[pytest.Item]) -> str:
    for item, following in zip_longest(items, items[1:]):
        if not loop.passes(item, following):
            return str(item.nodeid)
    return ""


def _on_code(
    loop: _Loop,
    items: Mapping[str, pytest.Item],
    code: CodeType,
    swapped: Sequence[FunctionType],
    tests: Sequence[Test],
) -> str:
    for function in swapped:
        function.__code__ = code
    return _first_failure(loop, [items[test.id] for test in tests if test.id in items])


def _name(mutant: Mutant) -> tuple[str, str]:
    return str(SOURCE / mutant.module), mutant.function


def _functions() -> dict[tuple[str, str], list[FunctionType]]:
    """Every function of lazarus by its file and its name, also those that a decorator has wrapped."""
    gc.unfreeze()
    found = defaultdict(list)
    for value in gc.get_objects():
        if type(value) is FunctionType and value.__code__.co_filename.startswith(str(SOURCE)):
            found[value.__code__.co_filename, value.__code__.co_qualname].append(value)
    gc.freeze()
    return found


def _code(mutant: Mutant, functions: Sequence[FunctionType]) -> CodeType | None:
    """The mutant's code for these functions, where they all are one function and it fits them."""
    if not mutant.function or len({function.__code__ for function in functions}) != 1:
        return None
    module = ".".join(["lazarus", *Path(mutant.module).with_suffix("").parts])
    loader = sys.modules[module].__loader__
    assert isinstance(loader, SourceFileLoader)
    whole = loader.source_to_code(mutant.source.encode(), _name(mutant)[0])
    codes = [code for code in _codes(whole) if code.co_qualname == mutant.function]
    fits = len(codes) == 1 and codes[0].co_freevars == functions[0].__code__.co_freevars
    return codes[0] if fits else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)
