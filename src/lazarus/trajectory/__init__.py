"""series: many models against one base, which is loaded and run once.

members.py    what each value of -f stands for
run.py        the use case: from options and models to a result
pairwise.py   one member against base, and against the member before it
rows.py       the compared rows of every model, in files
estimate.py   what it would take; trial.py runs a part of it
distances.py  how far any two models are apart
findings.py   what these show together: copies (identity.py), members out of order (order.py), a change of
              the training (change.py)

distances.py, findings.py, identity.py, order.py and change.py need neither models nor torch.
"""

from lazarus.trajectory.estimate import estimate_series
from lazarus.trajectory.run import SeriesObserver, series

__all__ = ["SeriesObserver", "estimate_series", "series"]
