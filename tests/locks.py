"""Write what is installed, with hashes, into `requirements/`: `make lock`.

A lock holds of every operating system and of Python 3.11 to 3.14. Its versions are those of
`constraints.txt`, to which a line is added for each package that is new. To raise a version, change its line,
or remove the line for the newest, and lock again. torch is in `constraints.txt` alone: the machine decides
which build of it there is (for CPUs, for one of CUDA's versions), each with other hashes and other packages
beside it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = {"run": ("all",), "dev": ("all", "dev", "docs", "release")}
"""what of the project each lock is for, beside its dependencies"""
LISTS = {"build": [*PROJECT["build-system"]["requires"], "editables"], "audit": ["pip-audit"]}
"""what the other locks are for: hatchling needs editables for `pip install -e`; pip-audit brings a pip of its
own, and so is no part of the environment"""
LOCKS = (*EXTRAS, *LISTS)
OF_THE_ENVIRONMENT = (*EXTRAS, "build")
NO_PART = """cuda-bindings
cuda-toolkit
nvidia-cudnn-cu13
nvidia-cusparselt-cu13
nvidia-nccl-cu13
nvidia-nvshmem-cu13
triton
"""
"""what torch needs where it is built for CUDA"""
LOWEST = "3.11.5"
"""pymdown-extensions, which the documentation needs, is for no Python before"""
HEAD = "# Every version that is tested: pip install -c constraints.txt '.[all]'. `make lock` adds to it.\n"


def pins(text: str) -> dict[str, str]:
    """Return the version of each package in a lock or in constraints, by its normalised name."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def lock(name: str, excluded: Path) -> str:
    """Return a lock's text, as uv resolves it."""
    options = ["--universal", "--python-version", LOWEST, "--generate-hashes", "--no-header", "--no-annotate"]
    options += ["--no-emit-package", "torch", "--excludes", str(excluded), "--constraints", str(CONSTRAINTS)]
    options += [word for extra in EXTRAS.get(name, ()) for word in ("--extra", extra)]
    source, wanted = ("pyproject.toml", ()) if name in EXTRAS else ("-", LISTS[name])
    return _uv([*options, source], "\n".join(wanted))


def _uv(arguments: Sequence[str], reads: str) -> str:
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *arguments]
    done = subprocess.run(command, input=reads, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main() -> None:
    """Write all locks, and the constraints that they make together."""
    found = {"torch": pins(CONSTRAINTS.read_text(encoding="utf-8"))["torch"]}
    with tempfile.TemporaryDirectory() as folder:
        excluded = Path(folder) / "excluded.txt"
        excluded.write_text(NO_PART, encoding="utf-8")
        for name in ("dev", *(each for each in LOCKS if each != "dev")):  # the largest first: it decides
            text = lock(name, excluded)
            (FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")
            if name in OF_THE_ENVIRONMENT:
                found |= pins(text)
                lines = (f"{each}=={version}\n" for each, version in sorted(found.items()))
                CONSTRAINTS.write_text(HEAD + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
