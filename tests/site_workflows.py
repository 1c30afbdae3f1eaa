"""What a workflow in the documentation must be, since it is pasted: it runs on what strangers wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

PINNED = re.compile(r"^ *(?:- )?uses: (?:\./|[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$)")
"""a commit, since a tag can be moved, and the version that it is; or an action of the same repository"""


def check_safe(text: str) -> None:
    """Hold a workflow, an action, or steps of one against what is asked of them.

    Raises:
        AssertionError: an action is not pinned, permissions are not the least, a script holds an expression,
            or pip installs versions that nobody has named.
    """
    for line in text.splitlines():
        assert "uses:" not in line or PINNED.match(line), f"no commit with its version: {line.strip()}"
    found = yaml.safe_load(text)
    if "jobs" in found:
        allowed = found.get("permissions")
        assert isinstance(allowed, dict), "permissions are not named, so they are those of the repository"
        assert set(allowed.values()) <= {"read", "none"}, f"more than reading: {allowed}"
    for script in _scripts(found):
        assert "${{" not in script, f"an expression becomes a part of the script: {script}"
        unpinned = [line for line in script.splitlines() if "pip install" in line and " -c " not in line]
        assert not unpinned, f"no constraints: {unpinned}"


def _scripts(found: Any) -> Iterator[str]:
    if isinstance(found, dict):
        if isinstance(found.get("run"), str):
            yield found["run"]
        for value in found.values():
            yield from _scripts(value)
    elif isinstance(found, list):
        for value in found:
            yield from _scripts(value)


def check_least(text: str) -> None:
    """Hold a workflow of this repository against what is asked of it beyond that.

    Raises:
        AssertionError: it may run on a stranger's code with the repository's rights, a job has rights that it
            does not name, or one that may write has code of the repository, and so what it depends on, in it.
    """
    check_safe(text)
    found = yaml.safe_load(text)
    assert not {"pull_request_target", "workflow_run"} & set(found[True]), "a stranger's change, with rights"
    assert found["permissions"] == {}, "the rights are those of each job"
    assert "concurrency" in found, "two runs at once are not thought of"
    for name, job in found["jobs"].items():
        assert "timeout-minutes" in job, f"{name} may run for six hours"
        assert isinstance(job.get("permissions"), dict), f"{name} does not name its rights"
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        if "write" in job["permissions"].values():
            has_identity = "id-token" in job["permissions"]
            assert "environment" in job or not has_identity, f"{name} may be anybody's that pushes a tag"
            assert not any(each.startswith(("actions/checkout", "./")) for each in uses), f"{name}: {uses}"
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout"):
                kept = step.get("with", {}).get("persist-credentials", True)
                assert kept is False, f"{name}: a token stays where later steps find it"
