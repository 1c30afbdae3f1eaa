"""The members of a series: what each value of `-f` stands for."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lazarus.errors import UsageError
from lazarus.loading import Model
from lazarus.messages import option
from lazarus.results import natural

_BRACES = re.compile(r"\{([^{}]*)\}")
_LISTED = 3


def listed(members: Model | Sequence[Model]) -> Sequence[Model]:
    """Return members as a sequence: one model is one of length 1."""
    is_one = isinstance(members, str | Path) or not isinstance(members, Sequence)
    return [members] if is_one else members  # type: ignore[list-item, return-value]


def expand(values: Sequence[Model]) -> list[Model]:
    """Return the models that values stand for, in their order: globs in natural order, braces as written.

    What is on disk under that very name is that, whatever characters are in it.

    Raises:
        UsageError: a glob matches nothing, or there is no member.

    >>> expand(["org/model@{step1000,step2000}"])
    ['org/model@step1000', 'org/model@step2000']
    """
    found: list[Model] = []
    for value in values:
        found += _expanded(str(value)) if isinstance(value, str | Path) else [value]
    if not found:
        raise UsageError(f"{option('finetuned')}: a series needs at least one model.", option="finetuned")
    return found


def _expanded(value: str) -> list[Model]:
    if os.path.exists(os.path.expanduser(value)):
        return [value]
    return [model for name in _braces(value) for model in _globbed(name)]


def _braces(value: str) -> list[str]:
    """Return every choice of the alternatives in braces, as a shell has them."""
    parts = _BRACES.split(value)
    choices = [[part] if i % 2 == 0 else part.split(",") for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _globbed(name: str) -> list[Model]:
    if not glob.has_magic(name):
        return [name]
    everything = glob.glob(os.path.expanduser(name))
    found = sorted((path for path in everything if _may_be_model(path)), key=natural)
    if found:
        return list(found)
    others = (
        f" (only {', '.join(sorted(everything)[:_LISTED])}: no folder, .gguf or .safetensors file)"
        if everything
        else ""
    )
    raise UsageError(
        f"{option('finetuned', name)}: no model matches{others}. Write a pattern that does, as in "
        "run/checkpoint-*, or name each model.",
        option="finetuned",
    )


def _may_be_model(path: str) -> bool:
    return os.path.isdir(path) or path.lower().endswith((".gguf", ".safetensors"))
