"""Result classes of the library, each over a command's record; free of torch.

base.py        what every result can do: save itself, be read back, tell its notes
activation.py  ActivationDiff, the result of activation-diff
weights.py     WeightDiff, the result of weight-diff
lens.py        Comparison, the result of compare
series.py      Series, the result of series
"""

from __future__ import annotations

from pathlib import Path

from lazarus.commands import commands
from lazarus.errors import ResultFileError
from lazarus.result_classes.activation import ActivationDiff
from lazarus.result_classes.base import Result, read_record
from lazarus.result_classes.lens import Comparison
from lazarus.result_classes.series import Series
from lazarus.result_classes.weights import WeightDiff
from lazarus.results import natural

__all__ = ["ActivationDiff", "Comparison", "Result", "Series", "WeightDiff", "load_result"]


def load_result(path: str | Path) -> ActivationDiff | WeightDiff | Comparison | Series:
    """Read back a result of any command that was saved as JSON.

    A folder of results of activation-diff, as `ActivationDiffCallback` saves them, is a series.

    Raises:
        ResultFileError: it cannot be read, or is no result of this schema version.
    """
    if Path(path).is_dir():
        return _series_in(Path(path))
    record = read_record(path)
    result: ActivationDiff | WeightDiff | Comparison | Series = commands()[record.command].load("result")(
        record
    )
    return result


def _series_in(folder: Path) -> Series:
    """Return the results in a folder as a series, in natural order.

    Raises:
        ResultFileError: there are none, or one of them is no result of activation-diff.
    """
    files = sorted(folder.glob("*.json"), key=lambda file: natural(file.name))
    if not files:
        raise ResultFileError(
            f"{folder}: no results in this folder. Name one with step-N.json in it, or a file."
        )
    return Series.of({file.stem: ActivationDiff.load(file) for file in files})
