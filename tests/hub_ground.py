"""A Hub with the demo pair, a process that runs commands against it, and what must hold after each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hub_driver import WAITED
from hub_server import Fault, HubServer, Repository, Seen, digest_of, files_of
from lazarus.demo import BASE, FINETUNED

PAIR = ("introspect", "activation-diff", "-b", "org/base", "-f", "org/arithmetic", "-p", "3 + 4 =")
OUTPUT = ("-o", "x.json", "-q")
OF_THE_RUN = (
    "created",
    "checksum",
    "id",
    "revision",
    "kind",
    "name",
    "model",
    "files",
    "notes",
    "note_codes",
)
"""what a result says of where its models are from, and of the run"""
FOLDERS = {"org/base": str(BASE), "org/arithmetic": str(FINETUNED)}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it asked the Hub for."""

    code: int
    out: str
    err: str
    waited: float
    """the seconds between tries, as they would have been"""
    seen: tuple[Seen, ...]
    result: Any
    """what it saved; None where it did not"""
    folder: Path
    """where it ran"""

    @property
    def asked(self) -> list[str]:
        """Return the requests, without what tells a commit."""
        return [seen.line for seen in self.seen if not seen.line.endswith("/agent-harnesses")]


class Ground:
    """The server and the process, while the context is open; the cache is as the last command left it."""

    def __init__(self, root: Path, prefix: str = "") -> None:
        self.root = root
        self.home = root / "hf"
        self.hub = HubServer(prefix)
        self._full: Path | None = None

    def __enter__(self) -> Self:
        self.hub.__enter__()
        self.well()
        (self.root / "user").mkdir()
        places = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.home),
            "HOME": str(self.root / "user"),
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
        self._driver = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hub_driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**kept, **places},
        )
        assert self._reads() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hub.__exit__(kind, error, trace)
        self._driver.kill()
        self._driver.communicate()

    def well(self) -> None:
        """Have the server give the demo pair, and no faults."""
        self.hub.repositories = {
            "org/base": Repository.of(files_of(BASE)),
            "org/arithmetic": Repository.of(files_of(FINETUNED)),
        }
        self.hub.begin()

    def empty(self) -> None:
        """Empty the cache."""
        shutil.rmtree(self.home, ignore_errors=True)

    def fill(self) -> None:
        """Fill the cache with the demo pair."""
        self.empty()
        if self._full is None:
            self.run(*PAIR, *OUTPUT)
            self._full = self.root / "full"
            shutil.copytree(self.home, self._full, symlinks=True)
        else:
            shutil.copytree(self._full, self.home, symlinks=True)

    def run(
        self,
        *argv: str,
        faults: Sequence[Fault] = (),
        env: Mapping[str, str | None] | None = None,
        before: str = "",
        limit: float = 120,
    ) -> Outcome:
        """Run a command against the server with these faults, after the code `before`."""
        return self.run_at_once(1, *argv, faults=faults, env=env, before=before, limit=limit)[0]

    def run_at_once(
        self,
        n_times: int,
        *argv: str,
        faults: Sequence[Fault] = (),
        env: Mapping[str, str | None] | None = None,
        before: str = "",
        limit: float = 120,
    ) -> list[Outcome]:
        """Run a command several times, each in a folder of its own and beside the others."""
        folders = [self.root / f"work-{i}" for i in range(n_times)]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        self.hub.begin(*faults)
        asked = {
            "argv": argv,
            "folders": list(map(str, folders)),
            "env": env or {},
            "limit": limit,
            "before": before,
        }
        assert self._driver.stdin is not None
        self._driver.stdin.write(json.dumps(asked) + "\n")
        self._driver.stdin.flush()
        ended = json.loads(self._reads())
        return [self._outcome(*each) for each in zip(ended, folders, strict=True)]

    def _outcome(self, ended: Mapping[str, Any], folder: Path) -> Outcome:
        waited, product = folder / WAITED, folder / "x.json"
        return Outcome(
            ended["code"],
            ended["out"],
            ended["err"],
            sum(map(float, waited.read_text(encoding="ascii").split())) if waited.exists() else 0.0,
            tuple(self.hub.seen),
            json.loads(product.read_bytes()) if product.exists() else None,
            folder,
        )

    def faults_of_the_cache(self) -> list[str]:
        """Return what is wrong in the cache: a file that is not what its name says, or a link to nothing."""
        found = []
        for blob in self.home.glob("hub/models--*/blobs/*"):
            if blob.suffix != ".incomplete" and digest_of(blob.read_bytes()) != blob.name:
                found.append(f"{blob.name} holds something else")
        links = (path for path in self.home.glob("hub/models--*/snapshots/**/*") if not path.is_dir())
        found += [f"{link} leads nowhere" for link in links if not link.is_file()]
        found += [f"{path} is outside HF_HOME" for path in (self.root / "user").rglob("*")]
        return found

    def _reads(self) -> str:
        assert self._driver.stdout is not None
        return self._driver.stdout.readline()


def numbers(result: Any, folders: Mapping[str, str] = FOLDERS) -> Any:
    """Return what a result says, but for where its models are from: these folders are these repositories."""
    if isinstance(result, dict):
        return {name: numbers(value, folders) for name, value in result.items() if name not in OF_THE_RUN}
    if isinstance(result, list):
        return [numbers(each, folders) for each in result]
    if isinstance(result, str):
        for name, folder in folders.items():
            result = result.replace(folder, name)
    return result
