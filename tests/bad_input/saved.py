"""Saved results that cannot be shown again, and gates that they do not meet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input.kind import BadInput, Prepare

SAVED = Path(__file__).parents[1] / "saved" / "activation-diff-2.json"


def _show(*more: str, changes: dict[str, Any] | None = None, damage: Callable[[str], str] = str) -> Prepare:
    """`lazarus show saved.json` on a result with these fields in it, whose text is then damaged."""

    def prepare(folder: Path) -> list[str]:
        found = json.loads(SAVED.read_bytes()) | (changes or {})
        (folder / "saved.json").write_text(damage(json.dumps(found)), encoding="utf-8")
        return ["show", "saved.json", *more]

    return prepare


KINDS = (
    BadInput(
        "no result named",
        "`lazarus show` without a file",
        lambda _: ["show"],
        ("Missing argument", "RESULT.json"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "result missing",
        "`lazarus show results.json`, where there is no such file",
        lambda _: ["show", "results.json"],
        ("results.json", "No such file", "Check the path"),
        exit_code=2,
    ),
    BadInput(
        "result is a folder",
        "`lazarus show base`",
        lambda _: ["show", "base"],
        ("base/config.json", "not a result", "-o FILE.json"),
        exit_code=2,
    ),
    BadInput(
        "result is no JSON",
        "`lazarus show saved.json`, a file that holds `Layer,Divergence`",
        _show(damage=lambda _: "Layer,Divergence"),
        ("saved.json", "not a result of schema version 1.0", "-o FILE.json"),
        exit_code=2,
    ),
    BadInput(
        "vectors of a saved result",
        "`lazarus show saved.json -o shift.safetensors`",
        _show("-o", "shift.safetensors"),
        ("-o shift.safetensors", "not kept in a saved result", "Run the comparison again"),
        exit_code=2,
    ),
    BadInput(
        "result cut short",
        "a saved result of which the end is missing",
        _show(damage=lambda text: text[: len(text) // 2]),
        ("saved.json", "not a result of schema version 1.0", "truncated", "-o FILE.json"),
        exit_code=2,
    ),
    BadInput(
        "result without its layers",
        "a saved result without the field `layers`",
        _show(damage=lambda text: text.replace('"layers"', '"other"')),
        ("saved.json", "unknown field `other`", "-o FILE.json"),
        exit_code=2,
    ),
    BadInput(
        "result of a later version",
        "a saved result of schema version 2.0",
        _show(changes={"schema_version": "2.0", "tool": {"name": "lazarus", "version": "3.1.0"}}),
        ("saved.json", "schema version 2.0, saved by lazarus 3.1.0", "schema version 1.0", "compare again"),
        exit_code=2,
    ),
    BadInput(
        "result of another command",
        "a saved result of a command that there is not",
        _show(changes={"command": "token-diff"}),
        ("saved.json", "a result of token-diff", "reads activation-diff, weight-diff, compare"),
        exit_code=2,
    ),
    BadInput(
        "result over itself",
        "`lazarus show saved.json -o saved.json`",
        _show("-o", "saved.json"),
        ("-o saved.json", "is read by this run", "a path of its own"),
        exit_code=2,
    ),
    BadInput(
        "threshold of a result",
        "`lazarus show saved.json --threshold 7`",
        _show("--threshold", "7"),
        ("--threshold 7.0", "a number from 0 to 2"),
        exit_code=2,
    ),
    BadInput(
        "gate on a result",
        "`lazarus show saved.json --expect identical`, of two models that differ",
        _show("--expect", "identical"),
        ("--expect identical", "changed", "times the noise floor"),
        exit_code=3,
    ),
)
