"""What the pages' examples need: the blocks of a page, and a terminal that runs them.

In the terminal `lazarus` is this very process, so that an example costs no import of torch. Bash is real.
Installing is checked and not done; of several processes there are two.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from typer.testing import CliRunner

from lazarus.cli import app

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = {found.name: found for found in map(Requirement, PROJECT["dependencies"])}
LONGEST_SECONDS = 300

_TITLE = re.compile(r'title="([^"]+)"')
_EXIT_CODE = re.compile(r"# exit code (\d+)$")
_STAND_IN = """#!{python} -SE
import os, sys
from multiprocessing.connection import Client
reads = sys.stdin.buffer.read() if "@-" in sys.argv else None
with Client({address!r}) as server:
    told = {{n: v for n, v in os.environ.items() if n.startswith("SLURM_")}}
    server.send((os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), reads, told))
    code, output, errors = server.recv()
sys.stdout.buffer.write(output)
sys.stdout.flush()
sys.stderr.buffer.write(errors)
sys.exit(code)
"""

Answer = tuple[int, bytes, bytes]


@dataclass(frozen=True)
class Block:
    """A block of code on a page: fenced with a language, or indented, which has none.

    A title is the name of the file that the block shows.
    """

    page: str
    line: int
    language: str
    title: str | None
    text: str

    @property
    def first_line(self) -> str:
        """By which the table of blocks that are not run names it."""
        return self.text.split("\n", 1)[0]

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"


@dataclass(frozen=True)
class Step:
    """A command of a block, the exit code that the page gives it, and what the page shows that it prints."""

    command: str
    exit_code: int = 0
    shown: str | None = None


def blocks_of(page: str, text: str) -> list[Block]:
    """Every block of code of a page, in order, by the rules of CommonMark."""
    found = []
    for token in MarkdownIt().parse(text):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language, _, rest = token.info.strip().partition(" ")
            title = _TITLE.search(rest)
            name = title.group(1) if title else None
            found.append(Block(page, token.map[0] + 1, language, name, token.content))
    return found


def steps_of(block: Block) -> list[Step]:
    """The commands of a `bash` or `console` block, each whole, however many lines it takes."""
    if block.language == "console":
        assert block.text.startswith("$ "), f"{block}: a console block begins with `$ ` and a command"
        parts = [part.split("\n", 1) for part in block.text.removeprefix("$ ").split("\n$ ")]
        return [_step(command, shown[0] if shown else "") for command, *shown in parts]
    steps, lines = [], ""
    for line in block.text.splitlines():
        lines += line + "\n"
        if _is_command(lines) and _is_whole(lines):
            steps.append(_step(lines.rstrip("\n"), None))
            lines = ""
    assert not _is_command(lines), f"{block}: bash cannot read {lines!r}"
    return steps


def _step(command: str, shown: str | None) -> Step:
    code = _EXIT_CODE.search(command)
    return Step(command, int(code.group(1)) if code else 0, shown)


def _is_command(lines: str) -> bool:
    return any(line.strip() and not line.startswith("#") for line in lines.splitlines())


def _is_whole(lines: str) -> bool:
    if lines.endswith("\\\n"):
        return False
    return subprocess.run(["bash", "-n"], input=lines, text=True, capture_output=True).returncode == 0


def matches(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed; a line of three dots stands for any number of lines."""
    pattern = "".join(
        "(?:.*\n)*?" if line == "..." else re.escape(line + "\n") for line in shown.splitlines()
    )
    return re.fullmatch(pattern, printed) is not None


class Terminal:
    """Bash in a folder, with the virtual environment's commands and `lazarus` in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, steps: list[Step], environment: dict[str, str] | None = None) -> None:
        """Run the commands in one shell, one after the other.

        Raises:
            AssertionError: one ends with another exit code, or prints something else, than the page says.
        """
        with _listening() as (listener, stand_ins):
            printed = [stand_ins / f"printed-{i}" for i in range(len(steps))]
            codes = stand_ins / "codes"
            script = "".join(
                f"{{\n{step.command}\n}} >{shlex.quote(str(path))} 2>&1\necho $? >>'{codes}'\n"
                for step, path in zip(steps, printed, strict=True)
            )
            _serve(listener, self._start(script, stand_ins, environment or {}))
            ended = [int(code) for code in codes.read_text().split()] if codes.exists() else []
            for i, step in enumerate(steps):
                output = printed[i].read_text(encoding="utf-8") if printed[i].exists() else ""
                assert i < len(ended), f"the shell itself ended in `{step.command}`:\n{output}"
                assert ended[i] == step.exit_code, f"exit code {ended[i]} of `{step.command}`:\n{output}"
                assert step.shown is None or matches(step.shown, output), (
                    f"the page shows:\n{step.shown}\nprinted is:\n{output}"
                )

    def _start(self, script: str, stand_ins: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        path = os.pathsep.join((str(stand_ins), str(Path(sys.executable).parent), os.environ["PATH"]))
        return subprocess.Popen(
            ["bash", "--norc", "-c", script],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
        )


@contextlib.contextmanager
def _listening() -> Iterator[tuple[Listener, Path]]:
    """A socket, and a folder of commands that ask at it; a short path, as sockets want it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Listener(str(folder / "socket"), "AF_UNIX") as listener:
            for command in STAND_INS:
                script = folder / command
                script.write_text(_STAND_IN.format(python=sys.executable, address=listener.address))
                script.chmod(0o755)
            yield listener, folder


def _serve(listener: Listener, shell: subprocess.Popen[bytes]) -> None:
    """Answer the shell's commands, one at a time, until it ends."""

    def wait() -> None:
        try:
            shell.wait(LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            shell.kill()
            shell.wait()
        with Client(listener.address) as end:
            end.send(None)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while _answer(listener):
        pass
    waiting.join()


def _answer(listener: Listener) -> bool:
    with listener.accept() as connection:
        asked = connection.recv()
        if asked is None:
            return False
        _reply(connection, *asked)
        return True


def _reply(
    connection: Connection,
    name: str,
    words: list[str],
    folder: str,
    reads: bytes | None,
    told: dict[str, str],
) -> None:
    with contextlib.chdir(folder), _environment(told):
        try:
            answer = STAND_INS[name](words, reads)
        except AssertionError as fault:
            answer = 99, b"", f"{name}: {fault}\n".encode()
    connection.send(answer)


@contextlib.contextmanager
def _environment(told: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _lazarus(words: list[str], reads: bytes | None) -> Answer:
    result = CliRunner().invoke(app, words, input=reads)
    errors = result.stderr_bytes or b""
    if result.exc_info and not isinstance(result.exception, SystemExit | None):
        errors += "".join(traceback.format_exception(*result.exc_info)).encode()
    return result.exit_code, result.stdout_bytes, errors


def _pip(words: list[str], reads: bytes | None) -> Answer:
    """Nothing is installed: whether the requirement can be read, and whether its extras are there.

    Of what the project needs, a version may be named that the project works with.
    """
    assert words[0] == "install", f"pip {words[0]} is not known here"
    told = ("-c", "--index-url")
    wanted = [word for last, word in pairwise(words) if not word.startswith("-") and last not in told]
    for word in wanted:
        requirement = Requirement(f"{PROJECT['name']}{word[1:]}" if word.startswith(".") else word)
        if requirement.name in NEEDED:
            taken = NEEDED[requirement.name].specifier
            assert all(taken.contains(each.version) for each in requirement.specifier), f"{word}: {taken}"
            continue
        assert requirement.name == PROJECT["name"], f"{word}: not this project"
        unknown = requirement.extras - set(PROJECT["optional-dependencies"])
        assert not unknown, f"{word}: there is no extra {unknown}"
    return 0, b"", b""


def _make(words: list[str], reads: bytes | None) -> Answer:
    """The demo is run; of every other target it is seen that make knows it."""
    if words == ["demo"]:
        return _lazarus(["demo"], None)
    done = subprocess.run(["make", "-C", str(ROOT), "-n", *words], capture_output=True)
    return done.returncode, b"", done.stderr


def _srun(words: list[str], reads: bytes | None) -> Answer:
    """Two tasks; the first one, which prints and saves, comes last."""
    assert words[0] == "lazarus", words
    for task in ("1", "0"):
        with _environment({"SLURM_PROCID": task, "SLURM_NTASKS": "2", "SLURM_LOCALID": task}):
            answer = _lazarus(words[1:], None)
    return answer


def _torchrun(words: list[str], reads: bytes | None) -> Answer:
    """The real one, with two processes; a folder that machines share is one here."""
    assert words[0] == "--nproc-per-node", words
    rest = [word.replace("/shared/", "") for word in words[2:]]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *rest]
    done = subprocess.run(command, capture_output=True)
    return done.returncode, done.stdout, done.stderr


STAND_INS = {"lazarus": _lazarus, "make": _make, "pip": _pip, "srun": _srun, "torchrun": _torchrun}
