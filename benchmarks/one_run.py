"""One comparison in a process of its own: what it took, and the divergence that it found.

Run as `python -m benchmarks.one_run TASK`, with a `Task` as JSON; prints an `OneRun` as JSON.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Task(Struct, frozen=True):
    """What is run: two models, a file of prompts, and the options of `activation_diff`."""

    base: str
    finetuned: str
    prompts: str
    options: dict[str, Any] = {}
    looks_for_common: bool = True
    """whether the two checkpoints are compared for tensors that they have in common"""


class OneRun(Struct, frozen=True):
    """Seconds of loading and of all that follows, the peak of memory in bytes, and what came out."""

    loading: float
    running: float
    peak: int
    divergence: list[float]
    memory: str
    notes: list[str]

    @property
    def seconds(self) -> float:
        """Both."""
        return self.loading + self.running


def run(task: Task) -> OneRun:
    """Run it once."""
    import transformers

    from benchmarks.in_process import Stopwatch
    from lazarus import activation_diff
    from lazarus.models import load

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not task.looks_for_common:
        load._load_over = lambda *_: None  # what it does where nothing is in common, less the looking
    stopwatch = Stopwatch()
    texts = Path(task.prompts).read_text(encoding="utf-8").splitlines()
    started = time.perf_counter()
    diff = activation_diff(task.base, task.finetuned, texts, observer=stopwatch, device="cpu", **task.options)
    ended = time.perf_counter()
    return OneRun(
        loading=stopwatch.loaded - started,
        running=ended - stopwatch.loaded,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
        divergence=[layer.divergence or 0.0 for layer in diff.layers],
        memory=diff.record.settings.memory,
        notes=diff.notes,
    )


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(run(msgspec.json.decode(sys.argv[1], type=Task))))
