"""Change points: where the training of a series became another one, as when its data are switched.

The size of a step, prompt by prompt and block by block, is a profile of what is being trained on: other data
move other prompts. It drifts while training goes on, and jumps where the data change. What is held against
chance is the jump between the three steps before and the three steps after, in units of how much the profile
changes from one step to the next; a step that is larger than both of its neighbours counts as well. The
limits come from runs of training without a change (benchmarks/series.py), not from a distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lazarus.trajectory.distances import Floats

FEWEST_STEPS = 7
FEWEST_PROMPTS = 8
FIRST, LAST = 4, 3
"""steps that must be there before a change, and from it on"""
WINDOW = 3
NOISE = 0.05
"""added to the variance from step to step, so that a very even run does not make a change of nothing"""
LEAST_JUMP, JUMP_WEIGHT = 0.5, 2.0
"""of a step's mean log square above both neighbours: what counts, and how much"""
LIMIT = 1.75
EARLY = {4: 1.55, 5: 1.2}
"""factors of the limit at early steps, where every run turns"""
UNEVEN = 1.5
"""a factor of the limit where the checkpoints are not evenly spaced"""
NEAR = 0.7
"""Splits this near to the best one are in its interval."""


@dataclass(frozen=True)
class Change:
    """A change of what the steps of training do."""

    step: int
    """the first step that is of the new kind; step 0 leads to the first member"""
    interval: tuple[int, int]
    """the first and the last step that may be that"""
    strength: float
    """1 is what is told at least"""


def find_change(sizes: Floats, steps: Sequence[int | None]) -> Change | None:
    """Look for the strongest change point.

    Args:
        sizes: ‖step‖ / ‖state‖ of each step, prompt and block, [steps, prompts, blocks].
        steps: the steps of training of the members, one for each step; None where they are not known.

    Returns:
        None where there is none, or too few steps or prompts to tell one.
    """
    profiles = _profiles(sizes)
    if profiles is None:
        return None
    strengths = _strengths(profiles, steps)
    best = int(np.argmax(strengths))
    if strengths[best] < 1:
        return None
    near = strengths >= NEAR * strengths[best]
    low = best - int(np.argmin(near[best::-1])) + 1 if not near[: best + 1].all() else 0
    high = best + int(np.argmin(near[best:])) - 1 if not near[best:].all() else len(near) - 1
    return Change(best, (low, high), float(strengths[best]))


def _profiles(sizes: Floats) -> Floats | None:
    """Return log squares of the sizes, [steps, prompts × blocks], of what moves at every step."""
    kept = sizes[:, np.isfinite(sizes).all((0, 2))]
    kept = kept[:, :, (kept > 0).all((0, 1))] if kept.size else kept
    n_steps, n_prompts, n_blocks = kept.shape
    if n_steps < FEWEST_STEPS or n_prompts < FEWEST_PROMPTS or not n_blocks:
        return None
    return 2 * np.log(kept).reshape(n_steps, -1)


def _strengths(logs: Floats, steps: Sequence[int | None]) -> Floats:
    """Return the strength of a change before each step, −inf where there are too few steps on a side."""
    level = logs.mean(1)
    shapes = logs - level[:, None]
    variances = (np.diff(shapes, axis=0) ** 2).mean(1) / 2
    strengths = np.full(len(logs), -np.inf)
    for step in range(FIRST, len(logs) - LAST + 1):
        before, after = shapes[step - WINDOW : step], shapes[step : step + WINDOW]
        jump = ((before.mean(0) - after.mean(0)) ** 2).mean() * WINDOW / 2
        # The change itself is no noise.
        noise = float(np.median(np.delete(variances, step - 1))) + NOISE
        is_even = _is_even(steps, step)
        score = jump / np.sqrt(noise)
        if is_even:
            score += JUMP_WEIGHT * max(0.0, _excess(level, step) - LEAST_JUMP)
        strengths[step] = score / (LIMIT * EARLY.get(step, 1.0) * (1.0 if is_even else UNEVEN))
    return strengths


def _excess(level: Floats, step: int) -> float:
    """Return how much more the steps grow here than just before and just after."""
    growth = np.diff(level[step - 2 : step + 2])
    return float(growth[1] - max(growth[0], growth[2]))


def _is_even(steps: Sequence[int | None], step: int) -> bool:
    """Return whether the checkpoints around a step are evenly spaced, as far as that is known."""
    around = [0, *steps][step - 2 : step + 3]
    known = [at for at in around if at is not None]
    if len(known) < len(around):
        return False
    gaps = np.diff(known)
    return bool(gaps.min() > 0 and gaps.max() <= 1.1 * gaps.min())
