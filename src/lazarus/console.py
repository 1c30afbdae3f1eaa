"""What a run shows while it goes on: the header on standard output, progress on standard error."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from lazarus.prompts import Prompt
from lazarus.render import text


class ConsoleObserver:
    """Prints the header as the run goes on; with `show`, a progress bar on standard error."""

    def __init__(self, *, show: bool, prints: bool = True) -> None:
        self._prints = prints
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not show,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def loading(self, role: Literal["base", "finetuned"], name: str) -> None:
        """Print which model is loaded; transformers draws the bar of its weights."""
        self._print(text.loading(role, name))

    def testing(self, prompts: Sequence[Prompt]) -> None:
        """Print the prompts."""
        self._print(text.prompts([prompt.text for prompt in prompts]))
        self._progress.start()
        self._task = self._progress.add_task("Tokenising", total=None)

    def running(self, n_tokens: int) -> None:
        """Begin the bar."""
        self._progress.update(self._task, description="Comparing", total=n_tokens)

    def advanced(self, n_tokens: int) -> None:
        """Move the bar."""
        self._progress.advance(self._task, n_tokens)

    def _print(self, lines: str) -> None:
        if self._prints:
            typer.echo(lines)


def quieten(*, show_bars: bool, show_logs: bool) -> None:
    """Keep the libraries below off standard error, unless their bars or logs are wanted."""
    if not show_bars:
        # tqdm reads it when it is imported; transformers draws the bar of a GGUF file with tqdm itself.
        os.environ["TQDM_DISABLE"] = "1"
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not show_logs:
        transformers.logging.set_verbosity_error()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not show_bars:
        transformers.logging.disable_progress_bar()
        disable_progress_bars()
