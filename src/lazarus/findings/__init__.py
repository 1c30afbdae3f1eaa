"""What the measurements say: from accumulators to the numbers and sentences of the result.

numbers.py   means, references beside them, verdict, summary
readout.py   the mean difference, read as tokens
traces.py    every token of a few prompts
limits.py    what a reader must know of the numbers
"""

from lazarus.findings.limits import limits
from lazarus.findings.numbers import Findings
from lazarus.findings.readout import read_differences
from lazarus.findings.traces import trace_tokens

__all__ = ["Findings", "limits", "read_differences", "trace_tokens"]
