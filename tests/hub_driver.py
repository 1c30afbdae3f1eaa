"""Commands that ask a Hub: a process that forks for each, with HF_ENDPOINT as it was when it began.

It reads a line of JSON for each command, or for several of it at once, and answers with one. huggingface_hub
reads the environment when it is imported. So a fork imports its constants again, which are then those of the
command's own environment.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

SHORTER = 100
"""by how much the waits of huggingface_hub between two tries are cut; WAITED has their sum"""
WAITED = "waited.txt"


def main() -> None:
    """Answer commands until there are no more."""
    import forks

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        folders = [Path(folder) for folder in asked["folders"]]
        trials = [
            forks.start(
                asked["argv"],
                folder,
                before=_environment(asked["env"], folder, asked["before"]),
                name=f"-{i}",
            )
            for i, folder in enumerate(folders)
        ]
        outcomes = [trial.ended(asked["limit"]) for trial in trials]
        sys.stdout.write(json.dumps([asdict(outcome) for outcome in outcomes]) + "\n")
        sys.stdout.flush()


def _environment(env: Mapping[str, str | None], folder: Path, code: str) -> Callable[[], None]:
    def before() -> None:
        os.environ.pop("HF_HUB_OFFLINE", None)  # forks sets it
        for name, value in env.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        from huggingface_hub import constants

        importlib.reload(constants)
        sleep = time.sleep

        def shorter(seconds: float) -> None:
            with Path(folder, WAITED).open("a", encoding="ascii") as file:
                file.write(f"{seconds}\n")
            sleep(seconds / SHORTER)

        vars(time)["sleep"] = shorter
        exec(code, {})

    return before


if __name__ == "__main__":
    main()
