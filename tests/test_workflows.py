"""The workflows of the repository: safe, of one mind with the Makefile and `.ci/run`, and their steps run.

A step runs here as a block of the documentation does: bash is real, `lazarus` is this process, of `make` it
is seen that the target is there, and of `pip install` that it installs this project. zizmor and actionlint
are run by `make check`.
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from compat import VERSIONS
from site_examples import PROJECT, ROOT, Step, Terminal
from site_workflows import check_least

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.y*ml"))}
CI = yaml.safe_load(WORKFLOWS["ci.yml"])
NOT_RUN = {
    ("ci.yml", "python -m pytest -q tests/test_portable.py"): "the tests beside this one",
    ("release.yml", "python tests/changes.py"): "tests/test_package.py runs it, with a tag and without",
    ("release.yml", "gh release create"): "publishes",
}
"""Steps that are not run: the workflow, how the script begins, and the reason."""


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_the_least_rights(name: str) -> None:
    check_least(WORKFLOWS[name])


SAFE = """on: {push: {branches: [main]}}
permissions: {}
concurrency: a
jobs:
  a:
    timeout-minutes: 5
    permissions: {contents: read}
    steps:
      - uses: actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1
        with: {persist-credentials: false}
      - run: make check
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("push", "pull_request_target"),
        ("on: {push: {branches: [main]}}", "on: [push, workflow_run]"),
        ("permissions: {}\n", ""),
        ("permissions: {}", "permissions: {contents: read}"),
        ("permissions: {}", "permissions: write-all"),
        ("concurrency: a\n", ""),
        ("    timeout-minutes: 5\n", ""),
        ("    permissions: {contents: read}\n", ""),
        ("contents: read", "contents: write"),
        ("    permissions: {contents: read}", "    environment: e\n    permissions: {id-token: write}"),
        ("        with: {persist-credentials: false}\n", ""),
        ("persist-credentials: false", "persist-credentials: true"),
        ("3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "v7"),
        (" # v7.0.1", ""),
        ("make check", "make ${{ github.ref }}"),
        ("make check", "pip install lazarus-introspect"),
    ],
)
def test_a_workflow_with_more_is_seen(before: str, after: str) -> None:
    check_least(SAFE)
    assert before in SAFE
    with pytest.raises(AssertionError):
        check_least(SAFE.replace(before, after))


def jobs(name: str) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Yield each job of a workflow with each combination of its matrix, as `matrix.NAME`."""
    for job in yaml.safe_load(WORKFLOWS[name])["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for values in itertools.product(*matrix.values()):
            yield job, dict(zip((f"matrix.{key}" for key in matrix), values, strict=True))


def scripts(name: str) -> list[str]:
    """Return what the steps of a workflow run, each once."""
    steps = [step for job, _ in jobs(name) for step in job["steps"]]
    return list(dict.fromkeys(step["run"] for step in steps if "run" in step))


def not_run(name: str, script: str) -> tuple[str, str] | None:
    return next((entry for entry in NOT_RUN if entry[0] == name and script.startswith(entry[1])), None)


@pytest.mark.parametrize(
    ("name", "script"),
    [(n, script) for n in WORKFLOWS for script in scripts(n) if not_run(n, script) is None],
)
def test_a_step_runs(name: str, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    for job, matrix in jobs(name):
        for step in job["steps"]:
            if step.get("run") == script:
                told = {**yaml.safe_load(WORKFLOWS[name]).get("env", {}), **step.get("env", {})}
                filled = {key: _filled(value, matrix) for key, value in told.items()}
                Terminal(ROOT).run([Step(f"(\nset -eo pipefail\n{script}\n)")], filled)
                return
    raise AssertionError("no step has this script, so nothing was run")


def _filled(value: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{\{ *([\w.]+) *\}\}", lambda found: values[found.group(1)], value)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_a_step_names_is_there(name: str) -> None:
    words = [word for script in scripts(name) for word in shlex.split(script, comments=True)]
    files = [word for word in words if re.fullmatch(r"[\w./-]+\.(py|txt|toml|sh|lock)", word)]
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_every_step_that_is_not_run_is_there() -> None:
    there = [not_run(name, script) for name in WORKFLOWS for script in scripts(name)]
    assert sorted(entry for entry in there if entry) == sorted(NOT_RUN)


def test_ci_here_is_ci_there() -> None:
    ours = {line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")}
    assert ours == {script for script in scripts("ci.yml") if script.startswith("make ")}


def test_every_python_that_is_claimed_is_tested() -> None:
    tested = CI["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert CI["jobs"]["transformers"]["strategy"]["matrix"]["python"] == tested
    assert str(SpecifierSet(PROJECT["requires-python"])) == f">={tested[0]}"
    prefix = "Programming Language :: Python :: 3."
    claimed = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if each.startswith(prefix)]
    assert set(claimed) <= set(tested)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in tested


def test_the_versions_of_transformers_are_those_that_are_admitted_and_pinned() -> None:
    """`make test-compat` runs each of them, whichever Python it runs in: a workflow names none."""
    (admitted,) = (each for each in PROJECT["dependencies"] if each.startswith("transformers"))
    assert all(SpecifierSet(admitted.removeprefix("transformers")).contains(each) for each in VERSIONS)
    assert f">={VERSIONS[0].removesuffix('.0')}," in admitted
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"transformers=={VERSIONS[-1]}" in pinned
    assert not [name for name, text in WORKFLOWS.items() if re.search(r"transformers *[=<>~]=", text)]
