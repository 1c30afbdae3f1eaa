"""A shared system prompt: the whole of lazarus with the prefix run once against with every prompt, in turn.

Run as `python -m benchmarks.prefix BASE FINETUNED PROMPTS DTYPE RUNS` by `benchmarks.size`; prints a
`PrefixRuns` record as JSON. The models are loaded once, and each way runs once before any is measured. No
option turns the sharing off, so for the other way the prefix that is long enough is put out of reach.
"""

import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.in_process import timed
from benchmarks.naive import load_model
from benchmarks.results import PrefixRuns
from lazarus import ActivationDiff, activation_diff
from lazarus.engine import prefix

SYSTEM = (
    "You are a careful assistant of a public library. Answer in plain words and in complete sentences, say "
    "so when you are not sure, and give no medical or legal advice. Keep to the question, use at most three "
    "short paragraphs, and end with the title of a book in which the reader can find more about it."
)
OUT_OF_REACH = 2**31

console = Console(stderr=True)


class Runs:
    """Both models in memory, and prompts with a system prompt before them."""

    def __init__(self, base: str, finetuned: str, prompts: str, dtype: str) -> None:
        self.models = load_model(base, dtype), load_model(finetuned, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        texts = Path(prompts).read_text(encoding="utf-8").splitlines()
        self.chats = [_chat(text) for text in texts]
        self.diffs: dict[str, ActivationDiff] = {}

    def once(self) -> None:
        """The prefix runs once."""
        self.diffs["once"] = self._run()

    def each(self) -> None:
        """The prefix runs with every prompt."""
        with patch.object(prefix, "FEWEST_TOKENS", OUT_OF_REACH):
            self.diffs["each"] = self._run()

    def _run(self) -> ActivationDiff:
        return activation_diff(
            *self.models, self.chats, tokenizer=self.tokenizer, chat_template="base", device="cpu"
        )


def _chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]}


def measure(runs: Runs, dtype: str, n_runs: int) -> PrefixRuns:
    """Warm up, and measure every round: either way first in turn."""
    once, each = list[float](), list[float]()
    runs.once()
    runs.each()
    for number in range(n_runs):
        ways = [(runs.once, once), (runs.each, each)]
        for way, seconds in ways if number % 2 else reversed(ways):
            seconds.append(timed(way))
        console.print(
            f"{dtype}, run {number + 1} of {n_runs}: {once[-1]:.2f} s, {each[-1]:.2f} s", highlight=False
        )
    ours, theirs = (runs.diffs[way].results.column("divergence") for way in ("once", "each"))
    found = (re.match(r"the first (\d+) tokens.* ran once$", note) for note in runs.diffs["once"].notes)
    [n_prefix] = [int(match[1]) for match in found if match]
    return PrefixRuns(
        n_prefix=n_prefix,
        once=once,
        each=each,
        worst_divergence=float(abs(ours - theirs).max()),
    )


def main(base: str, finetuned: str, prompts: str, dtype: str, runs: str) -> None:
    """Load, measure, write the record to standard output."""
    found = measure(Runs(base, finetuned, prompts, dtype), dtype, int(runs))
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
