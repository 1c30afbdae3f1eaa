"""Statistics of many prompts. NumPy only: no torch here, and SciPy where it is needed.

verdict.py     what numerical noise alone may reach, and whether two models differ by more
intervals.py   where the mean divergence may lie, and the layer from which it is above the noise
correlation.py whether two models put prompts in one order, and intervals of what scores say
groups.py      how much more one group of prompts diverges than another
columns.py     what these share
"""

from lazarus.statistics.correlation import (
    rank_correlation,
    share_interval,
    similarity_correlation,
    size_interval,
)
from lazarus.statistics.groups import Contrast, GroupCurve, contrasts, group_curves
from lazarus.statistics.intervals import MIN_PROMPTS, Intervals, intervals, onset, signed_intervals
from lazarus.statistics.verdict import FACTOR, Floor, find_verdict, noise_floor, share_floor

__all__ = [
    "FACTOR",
    "MIN_PROMPTS",
    "Contrast",
    "Floor",
    "GroupCurve",
    "Intervals",
    "contrasts",
    "find_verdict",
    "group_curves",
    "intervals",
    "noise_floor",
    "onset",
    "rank_correlation",
    "share_floor",
    "share_interval",
    "signed_intervals",
    "similarity_correlation",
    "size_interval",
]
