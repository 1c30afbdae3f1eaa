"""What the measurements say: from accumulators to the numbers and sentences of the result.

numbers.py   means, references beside them, verdict, summary
rounding.py  whether one of two models is the other one, rounded to its stored dtype
readout.py   the mean difference, read as tokens
traces.py    every token of a few prompts
breaks.py    which model gives states that are not finite, and why
limits.py    what a reader must know of the numbers
"""

from lazarus.findings.breaks import break_notes, broken_parts
from lazarus.findings.limits import limits
from lazarus.findings.numbers import Findings
from lazarus.findings.readout import read_differences
from lazarus.findings.rounding import Rounded, find_rounding
from lazarus.findings.traces import trace_tokens

__all__ = [
    "Findings",
    "Rounded",
    "break_notes",
    "broken_parts",
    "find_rounding",
    "limits",
    "read_differences",
    "trace_tokens",
]
