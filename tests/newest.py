"""Write the list of architectures with the newest transformers that is published: `make test-newest`.

constraints.txt names the version that is tested; a user installs the newest. Where this fails, an
architecture is new, gone or different in it: the page in docs/ then says what was found.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from compat import FOLDER, made

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"


def main() -> None:
    """Run the tests of every architecture, and hold the page that they write against the one before."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = (each for each in project["dependencies"] if each.startswith("transformers"))
    python = made(FOLDER / "newest", requirement)
    told = "import transformers; print('transformers', transformers.__version__, flush=True)"
    subprocess.run([python, "-c", told], check=True)
    before = PAGE.read_text(encoding="utf-8")
    tests = ["-q", "-p", "no:cacheprovider", "--update-golden", "tests/test_architectures.py"]
    done = subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT)
    if done.returncode or PAGE.read_text(encoding="utf-8") != before:
        sys.exit(f"an architecture is new, gone or different: see `git diff {PAGE.relative_to(ROOT)}`")


if __name__ == "__main__":
    main()
