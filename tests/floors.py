"""Run tests with the lowest version that pyproject admits of each package: `make test-floors`.

The versions go into an environment of its own, torch's from PyPI too, which on Linux x86_64 is a build for
CUDA of 3.4 GB. What these packages need besides is the newest that fits them. The tests are those of the
public surface and those of strangers' files, faults and determinism.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parent
FOLDER = ROOT / ".venv-floors"
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "beartype", "jsonschema")
"""what the tests need besides, in the versions of constraints.txt"""
TESTS = (
    *("compat", "corpus", "determinism", "faults", "scratch"),
    *("adapter_limits", "files", "hostile_code", "rendering"),
)


def floors() -> list[str]:
    """Return `name==version` for the lowest version of each package that pyproject admits, with all extras.

    What is built from source is left out: llama-cpp-python, which `[all]` leaves out too.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    chosen = re.search(r"\[(.+)\]", extras["all"][0])
    assert chosen is not None
    wanted = [*project["dependencies"], *(each for name in chosen[1].split(",") for each in extras[name])]
    return [_lowest(Requirement(each)) for each in wanted]


def _lowest(wanted: Requirement) -> str:
    (lowest,) = [each.version for each in wanted.specifier if each.operator == ">="]
    return f"{wanted.name}=={lowest}"


def environment() -> Path:
    """Make the environment where its versions are not those that it has, and return its Python."""
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tools = [line for line in pinned if line.split("==")[0] in TOOLS]
    listed = "\n".join([*floors(), *tools]) + "\n"
    python, constraints = FOLDER / "bin" / "python", FOLDER / "floors.txt"
    if constraints.exists() and constraints.read_text(encoding="utf-8") == listed:
        return python
    venv.create(FOLDER, clear=True, with_pip=True)
    wanted = FOLDER / "wanted.txt"
    wanted.write_text(listed, encoding="utf-8")
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "-c", wanted, "-e", f"{ROOT}[all]", *TOOLS], check=True)
    wanted.rename(constraints)
    return python


def main() -> None:
    """Say which versions are tested, and run the tests."""
    sys.stdout.write("\n".join(floors()) + "\n")
    sys.stdout.flush()
    files = [HERE / f"test_{name}.py" for name in TESTS]
    options = ["-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    sys.exit(subprocess.run([environment(), "-m", "pytest", *options, *files], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
