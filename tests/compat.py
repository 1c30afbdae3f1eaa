"""Run `test_compat.py` with several versions of transformers: `make test-compat`.

Each version records the demo's base first, so that the tests of each compare it with what the others made of
it. Each version has an environment of its own for transformers and what it needs in other versions, such as
tokenizers. Everything else, torch above all, is that of the environment in which this runs. The table in
docs/compatibility.md is written with `--update`; otherwise it must say what was found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from lazarus.demo import BASE
from test_compat import RECORDINGS as NAME_OF_RECORDINGS
from test_compat import TEXTS

HERE = Path(__file__).parent
FOLDER = HERE.parent / ".venv-compat" / f"{sys.version_info.major}.{sys.version_info.minor}"
"""an environment is of one Python: a packed extension of another does not load in it"""
RECORDINGS = FOLDER / "recordings"
PAGE = HERE.parent / "docs" / "compatibility.md"
VERSIONS = ("5.5.0", "5.12.1", "5.24.0")
"""the oldest, one in the middle, the newest"""
PEFT = "peft==0.21.2"

HEAD = """# Which versions of transformers

lazarus works with transformers 5.5 and newer, below 6; older ones are refused, since a checkpoint can make
them run code ([why](architecture.md#dependencies)). `make test-compat` runs `tests/test_compat.py` with the
versions of this table, on the pair of models that ships; CI does so on Python 3.11 to 3.14. torch, PEFT and
all else are those of `constraints.txt`; `make test-floors` runs the same with the lowest version of every
package that Lazarus admits.

"""


def environment(version: str) -> Path:
    """Make an environment with this version of transformers, and return its Python."""
    folder = FOLDER / version
    if (folder / "complete").exists():
        return folder / "bin" / "python"
    python = made(folder, f"transformers=={version}")
    (folder / "complete").touch()
    return python


def made(folder: Path, requirement: str) -> Path:
    """Make an environment with this transformers and else what this one has; return its Python."""
    venv.create(folder, clear=True, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    shared = sysconfig.get_path("purelib")
    (own / "zz_shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", encoding="utf-8")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    # Else what this environment has would do wherever it is admitted.
    subprocess.run([*pip, "--quiet", "--upgrade", requirement, PEFT], check=True)
    return python


def record(version: str) -> None:
    """Record the demo's base with this version, for the tests of every version."""
    folder = RECORDINGS / version
    shutil.rmtree(folder, ignore_errors=True)
    texts = [argument for text in TEXTS for argument in ("-p", text)]
    command = [
        "-m",
        "lazarus",
        "introspect",
        "record",
        "-m",
        str(BASE),
        *texts,
        "--no-split",
        "--logits",
        "--top-k",
        "0",
    ]
    done = subprocess.run(
        [environment(version), *command, "-o", str(folder), "--quiet"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def results(version: str) -> dict[str, str]:
    """Return what each test says with this version: works, fails, or why it is refused."""
    python, report = environment(version), FOLDER / f"{version}.xml"
    told = "from importlib.metadata import version; print(version('transformers'))"
    installed = subprocess.run(
        [python, "-c", told], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert installed == version, f"{python} has transformers {installed}, not {version}"
    options = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]  # which has properties
    arguments = [*options, f"--junitxml={report}", str(HERE / "test_compat.py")]
    done = subprocess.run(
        [python, "-m", "pytest", *arguments],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env={**os.environ, NAME_OF_RECORDINGS: str(RECORDINGS)},
    )
    if done.returncode:
        sys.stderr.write(done.stdout[-8000:] + done.stderr[-2000:])
    cases = ElementTree.parse(report).iter("testcase")
    return {case.attrib["name"].split("[")[0]: _told(case) for case in cases}


def _told(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "fails"
    if case.find("skipped") is not None:
        return "not tried"
    reasons = [found.attrib["value"] for found in case.iter("property") if found.attrib["name"] == "refused"]
    return f"refused: {reasons[0]}" if reasons else "works"


def page(found: Sequence[dict[str, str]]) -> str:
    """Return the page of the docs."""
    lines = [f"| | {' | '.join(VERSIONS)} |", f"|---|{'---|' * len(VERSIONS)}"]
    for name in found[0]:
        told = name.removeprefix("test_").replace("_", " ")
        lines.append(f"| {told[0].upper()}{told[1:]} | {' | '.join(each[name] for each in found)} |")
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Run all versions, one after the other, and hold what they do against the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the page")
    update = parser.parse_args().update
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(record, VERSIONS))
        found = list(pool.map(results, VERSIONS))
    text = page(found)
    sys.stdout.write(text)
    if update:
        PAGE.write_text(text, encoding="utf-8")
    n_failed = sum(told == "fails" for each in found for told in each.values())
    n_passed = sum(len(each) for each in found) - n_failed
    sys.stdout.write(f"\n{n_passed} passed, {n_failed} failed\n")
    if n_failed or text != PAGE.read_text(encoding="utf-8"):
        sys.exit(f"{PAGE} says otherwise: see `make test-compat UPDATE=--update`")


if __name__ == "__main__":
    main()
