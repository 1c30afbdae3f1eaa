"""One kind of bad input, and the few tools with which the kinds are made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Prepare = Callable[[Path], list[str]]


@dataclass(frozen=True)
class BadInput:
    """What a user did wrong, and what must come of it.

    `prepare` is given a folder in which `base` and `finetuned` are good models; it adds what the
    mistake needs and returns the command's arguments, which are run from that folder.
    """

    title: str
    did: str
    """the mistake in words, for the documentation"""
    prepare: Prepare
    says: tuple[str, ...]
    """what the one message must contain: what was wrong, where, which values, what to do"""
    exit_code: int = 1
    stdin: bytes = b""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """the world that it takes: a missing package, a full disk, a Hub that refuses"""
    by_typer: bool = False
    """the command line's parser says it, in a box of its own"""
    saves: tuple[str, ...] = ()
    """the files that it leaves all the same"""


def compare(
    *more: str, b: str = "base", f: str = "finetuned", p: str = "Hello", o: str = "diff.json"
) -> list[str]:
    """The arguments of a good comparison, with what is wrong put in its place."""
    return ["introspect", "activation-diff", "-b", b, "-f", f, "-p", p, "-o", o, *more]


def typed(*more: str, **values: str) -> Prepare:
    """A mistake that needs no file: it is in the arguments alone."""
    return lambda _: compare(*more, **values)


def holding(name: str, content: str | bytes, *more: str, **values: str) -> Prepare:
    """A mistake that is in one file."""

    def prepare(folder: Path) -> list[str]:
        raw = content.encode("utf-8") if isinstance(content, str) else content
        (folder / name).write_bytes(raw)
        return compare(*more, **values)

    return prepare


def damaged(damage: Callable[[Path], None], *more: str, **values: str) -> Prepare:
    """A fine-tuned model `damaged`, which is a copy of `base` after `damage` was done to it."""

    def prepare(folder: Path) -> list[str]:
        damage(Path(shutil.copytree(folder / "base", folder / "damaged")))
        return compare(*more, **{"f": "damaged", **values})

    return prepare


def overwrite(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A damage: this is all that the file of that name holds."""
    raw = content.encode("utf-8") if isinstance(content, str) else content

    def damage(model: Path) -> None:
        (model / name).write_bytes(raw)

    return damage


def change_json(path: Path, **changes: Any) -> None:
    """Write values into a JSON file; None takes one out."""
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
