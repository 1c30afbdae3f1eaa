"""Progress of a run: the header on standard output, bars on standard error."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self, TypedDict, Unpack

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from lazarus.prompts import Prompt
from lazarus.render.activation import text
from lazarus.render.base import words
from lazarus.render.base.escape import escaped
from lazarus.render.lens import text as lens_text
from lazarus.render.series import text as series_text
from lazarus.render.weights import text as weight_text
from lazarus.results.anonymous import without_paths
from lazarus.terminal import say


class Printing(TypedDict, total=False):
    """The options of a console."""

    prints: bool
    """whether it prints at all, which one process of several does"""
    saves: bool
    """whether the run goes on where standard output is closed"""
    anonymous: bool
    """whether of a path its last part is printed"""


class _Console:
    """Prints the header as the run goes on; with `show`, a progress bar on standard error.

    Where standard output is closed, as after `| head -1`, a run that saves goes on.
    """

    def __init__(self, *counts: ProgressColumn, show: bool, **how: Unpack[Printing]) -> None:
        self._how = how
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            *counts,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            # What is printed meanwhile goes through the guarded streams, and not through rich.
            redirect_stdout=False,
            redirect_stderr=False,
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

    def _begin(self, description: str, total: int | None) -> None:
        self._progress.start()
        self._task = self._progress.add_task(description, total=total)

    def advanced(self, amount: int) -> None:
        """Move the bar."""
        self._progress.advance(self._task, amount)

    def _named(self, name: str) -> str:
        return without_paths(name) if self._how.get("anonymous") else name

    def _print(self, lines: str) -> None:
        if not self._how.get("prints", True):
            return
        try:
            say(without_paths(lines) if self._how.get("anonymous") else lines)
        except OSError:
            if not self._how.get("saves"):
                raise


class ConsoleObserver(_Console):
    """Shows the progress of activation-diff."""

    def __init__(self, *, show: bool, **how: Unpack[Printing]) -> None:
        super().__init__(MofNCompleteColumn(), TextColumn("tokens"), show=show, **how)
        self._steps = iter(("Comparing", "Attributing"))

    def loading(self, role: Literal["base", "finetuned"], name: str) -> None:
        """Print which model is loaded; transformers draws the bar of its weights."""
        self._print(words.loading(role, self._named(name)))

    def testing(self, prompts: Sequence[Prompt]) -> None:
        """Print the prompts."""
        self._print(text.prompts([prompt.text for prompt in prompts]))
        self._begin("Tokenising", None)

    def running(self, n_tokens: int) -> None:
        """Begin the bar; again where the change is attributed."""
        self._progress.reset(self._task, description=next(self._steps, "Attributing"), total=n_tokens)


class RecordObserver(_Console):
    """Shows the progress of record."""

    def __init__(self, *, show: bool, **how: Unpack[Printing]) -> None:
        super().__init__(MofNCompleteColumn(), TextColumn("tokens"), show=show, **how)

    def loading(self, _role: Literal["base", "finetuned"], name: str) -> None:
        """Print which model is loaded."""
        self._print(f"Loading model: {escaped(self._named(name))}")

    def testing(self, prompts: Sequence[Prompt]) -> None:
        """Print the prompts."""
        self._print(text.prompts([prompt.text for prompt in prompts], verb="Recording"))
        self._begin("Tokenising", None)

    def running(self, n_tokens: int) -> None:
        """Begin the bar."""
        self._progress.reset(self._task, description="Recording", total=n_tokens)


class WeightObserver(_Console):
    """Shows the progress of weight-diff."""

    def __init__(self, *, show: bool, **how: Unpack[Printing]) -> None:
        super().__init__(TaskProgressColumn(), show=show, **how)

    def loading(self, role: Literal["base", "finetuned"], name: str) -> None:
        """Print which checkpoint is opened."""
        self._print(words.loading(role, self._named(name)))

    def detected(self, families: tuple[str, str], n_layers: int) -> None:
        """Print what the two are."""
        self._print(weight_text.detected(families, n_layers))

    def running(self, n_elements: int) -> None:
        """Begin the bar."""
        self._begin("Comparing", n_elements)


class LensObserver(_Console):
    """Shows the progress of compare."""

    def __init__(self, *, show: bool, **how: Unpack[Printing]) -> None:
        super().__init__(MofNCompleteColumn(), TextColumn("layers"), show=show, **how)

    def loading(self, _role: Literal["base", "finetuned"], name: str) -> None:
        """Print which model is loaded; transformers draws the bar of its weights."""
        self._print(lens_text.loading(self._named(name)))

    def running(self, n_layers: int) -> None:
        """Begin the bar."""
        self._begin("Reading", n_layers)


class SeriesObserver(_Console):
    """Shows the progress of series."""

    def __init__(self, *, show: bool, **how: Unpack[Printing]) -> None:
        super().__init__(MofNCompleteColumn(), TextColumn("models"), show=show, **how)

    def loading(self, role: Literal["base", "finetuned"], name: str) -> None:
        """Print that base is loaded; of the others the bar tells."""
        if role == "base":
            self._print(words.loading(role, self._named(name)))

    def testing(self, n_members: int, prompts: Sequence[Prompt]) -> None:
        """Print how many models and prompts there are."""
        self._print(series_text.comparing(n_members, len(prompts)))

    def running(self, n_members: int) -> None:
        """Begin the bar."""
        self._begin("Comparing", n_members)


def quieten(*, show_bars: bool, show_logs: bool) -> None:
    """Keep the libraries below off standard error, unless their bars or logs are wanted."""
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not show_logs:
        transformers.logging.set_verbosity_error()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not show_bars:
        transformers.logging.disable_progress_bar()
        disable_progress_bars()
