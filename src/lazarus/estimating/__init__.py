"""Estimates: what a run would take, measured on stand-ins for its models (`lazarus.models`).

sampling.py   a few of the batches run, and tell what all of them take
flops.py      floating-point operations of a pass, as a function of the shape of its batch
memory.py     the peak of this process's memory
"""

from lazarus.estimating.flops import PassFlops, count, count_passes
from lazarus.estimating.memory import device_peak, peak_bytes, reset_peak, since_start
from lazarus.estimating.sampling import Sampled, Size, extrapolated, spread_out

__all__ = [
    "PassFlops",
    "Sampled",
    "Size",
    "count",
    "count_passes",
    "device_peak",
    "extrapolated",
    "peak_bytes",
    "reset_peak",
    "since_start",
    "spread_out",
]
