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
from lazarus.result_classes.activation import ActivationDiff
from lazarus.result_classes.base import Result, read_record
from lazarus.result_classes.lens import Comparison
from lazarus.result_classes.series import Series
from lazarus.result_classes.weights import WeightDiff

__all__ = ["ActivationDiff", "Comparison", "Result", "Series", "WeightDiff", "load_result"]


def load_result(path: str | Path) -> ActivationDiff | WeightDiff | Comparison | Series:
    """Read back a result of any command that was saved as JSON.

    Raises:
        ResultFileError: it cannot be read, or is no result of this schema version.
    """
    record = read_record(path)
    result: ActivationDiff | WeightDiff | Comparison | Series = commands()[record.command].load("result")(
        record
    )
    return result
