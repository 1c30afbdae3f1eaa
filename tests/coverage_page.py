"""Write docs/coverage.md from coverage's JSON: which lines and branches of each room the tests run."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "coverage.md"
REASONS = {
    "__main__.py": "runs in processes of its own",
    "_transformers.py": "what other versions need: `make test-compat`",
    "cli/": "the rest runs in processes of its own",
    "commands.py": "a command that a test registers, in processes of its own",
    "console.py": "bars on a terminal, in processes of their own",
    "shards/": "several processes that share a run",
}
"""Why a room is below the least, by its name."""

HEAD = """# Which lines the tests run

`make coverage` runs every test and writes this page. What runs in a process that a test starts is not
counted, such as `__main__.py`.

"""


def room_of(path: str) -> str:
    """Return the room of a file: the package below `lazarus`, or the module."""
    parts = Path(path).parts
    inside = parts[parts.index("lazarus") + 1 :]
    return f"{inside[0]}/" if len(inside) > 1 else inside[0]


def page(found: dict[str, Any]) -> str:
    """Return the page, with a row for each room and one for all of them."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    names = ("covered_lines", "num_statements", "covered_branches", "num_branches")
    for path, each in found["files"].items():
        for room in (room_of(path), "all"):
            sums[room] = [one + each["summary"][name] for one, name in zip(sums[room], names, strict=True)]
    rows = ["| room | lines | branches | why below 90 % |", "|---|---|---|---|"]
    rows += [_row(room, *sums[room]) for room in [*sorted(sums.keys() - {"all"}), "all"]]
    return HEAD + "\n".join(rows) + "\n"


def _row(room: str, lines: int, n_lines: int, branches: int, n_branches: int) -> str:
    shares = [
        f"{100 * part / whole:.1f} %" if whole else ""
        for part, whole in ((lines, n_lines), (branches, n_branches))
    ]
    return f"| `{room}` | {shares[0]} | {shares[1]} | {REASONS.get(room, '')} |"


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(Path(sys.argv[1]).read_bytes())), encoding="utf-8")
