"""The page on security is true: each of its rows names a test with that many cases, or a target of make."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from lazarus import bounds

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
_ROW = re.compile(r"^\| .* \| (\d+) \| .* \| `(test_\w+\.py)::(\w+)` \|$", re.MULTILINE)


def test_every_row_has_a_test_with_as_many_cases() -> None:
    told = {(file, name): int(tried) for tried, file, name in _ROW.findall(PAGE)}
    assert len(told) > 20
    files = sorted({f"tests/{file}" for file, _ in told})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = Counter(re.findall(r"^tests/(test_\w+\.py)::(\w+)", listed, re.MULTILINE))
    assert told == {row: found[row] for row in told}


def test_no_row_is_without_one() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    rows = [line for line in PAGE.splitlines() if re.match(r"\| (?!---)", line) and " | " in line]
    tables = [line for line in rows if not re.search(r"\| (tried|trials|limit) \|", line)]
    named = set(re.findall(r"`make ([a-z-]+)", PAGE))
    assert tables
    assert named <= targets


def test_every_limit_is_on_the_page() -> None:
    limits = {name for name in vars(bounds) if name.isupper() and name not in ("LIFT", "VARIABLE")}
    assert limits == set(re.findall(r"^\| `([A-Z_]+)` \|", PAGE, re.MULTILINE))
    for name in limits:
        value = getattr(bounds, name)
        shown = f"2^{value.bit_length() - 1}" if value > 2**16 and value & (value - 1) == 0 else f"{value:,}"
        assert f"| `{name}` | {shown} |" in PAGE, name
