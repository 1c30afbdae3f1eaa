"""What the study of depth found: slopes with their intervals, a figure, and the measured part of its page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from msgspec import Struct
from numpy.typing import NDArray

from benchmarks.depth_training import ARMS, TASKS
from benchmarks.trust_report import table

N_RESAMPLES, SEED = 2000, 0
QUANTITIES = {
    "divergence": "divergence",
    "relative_l2": "relative L2",
    "local": "local change",
    "update": "update",
}
Floats = NDArray[np.float64]


class Profile(Struct, frozen=True):
    """What Lazarus measures of each layer on one group of prompts, means over the prompts."""

    divergence: list[float]
    """1 − cosine similarity of the two residual streams after the block"""
    relative_l2: list[float]
    """‖f − b‖ / ‖b‖"""
    local: list[float]
    """‖f − b‖ / ‖b‖ of the two blocks' outputs on one and the same input"""
    per_prompt: list[list[float]]
    """divergence: [prompts, layers]"""


class Run(Struct, frozen=True):
    """One changed model against the base."""

    task: str
    arm: str
    seed: int
    losses: list[float]
    """on held-out text before and after; none of noise"""
    update: list[float]
    """‖ΔW‖ / ‖W‖ of each block, over all its weights"""
    general: Profile
    own: Profile
    """on text of the task"""


def slope(profile: Sequence[float] | Floats) -> Floats:
    """The slope of a profile over relative depth, as a share of its mean.

    Depth runs from 0, the first block, to 1, the last. The line is that of least squares. 0 is a flat
    profile, and 2 is one that rises in a straight line from 0.

    Args:
        profile: [..., layers], not negative.
    """
    values = np.asarray(profile, dtype=np.float64)
    depth = np.linspace(0, 1, values.shape[-1])
    depth -= depth.mean()
    found: Floats = (values @ depth) / (depth @ depth) / values.mean(-1)
    return found


def late_share(profile: Sequence[float]) -> float:
    """The share of the sum that is in the last third of the layers; of a flat profile a third."""
    return float(sum(profile[-(len(profile) // 3) :]) / sum(profile))


def interval(runs: Sequence[Run], prompts: str) -> tuple[float, float]:
    """The 95 % interval of the mean slope of divergence over runs, by resampling the prompts they share."""
    rows = np.array([getattr(run, prompts).per_prompt for run in runs])  # [runs, prompts, layers]
    chance = np.random.default_rng(SEED)
    drawn = chance.integers(rows.shape[1], size=(N_RESAMPLES, rows.shape[1]))
    slopes = [slope(rows[:, chosen].mean(1)).mean() for chosen in drawn]
    low, high = np.quantile(slopes, (0.025, 0.975))
    return float(low), float(high)


def page(runs: Sequence[Run]) -> list[str]:
    """The measured part of the page."""
    return [
        _trained(runs),
        "**Slopes on general prompts.** The mean over seeds, for divergence with the 95 % interval over "
        "prompts, and in parentheses the range over seeds.",
        _slopes(runs, "general"),
        "**Slopes on text of the task**, seen in training but for the last 5 lines, or 15 of the "
        "classification.",
        _slopes(runs, "own"),
        "**The share of the last third of the layers**, on general prompts, mean over seeds. A flat "
        "profile has 33 %.",
        _late(runs),
        f"{_retained(runs)} {_without_the_first(runs)}",
    ]


def _groups(runs: Sequence[Run]) -> Iterable[tuple[str, str, list[Run]]]:
    for task, arm in product(TASKS, ARMS):
        if found := [run for run in runs if (run.task, run.arm) == (task, arm)]:
            yield ("any" if arm == "noise" else task), arm, found


def _trained(runs: Sequence[Run]) -> str:
    rows = [
        (
            task,
            arm,
            ", ".join(f"{run.losses[0]:.2f} to {run.losses[1]:.2f}" for run in found if run.losses) or "–",
            f"{np.mean([run.update for run in found]):.2e}",
            f"{max(max(r.update) / min(r.update) for r in found):.2f}",
        )
        for task, arm, found in _groups(runs)
    ]
    return table(
        [
            "task",
            "changed by",
            "loss on held-out text, before to after, of each seed",
            "mean ‖ΔW‖ / ‖W‖",
            "largest over smallest",
        ],
        rows,
    )


def _slopes(runs: Sequence[Run], prompts: str) -> str:
    rows = []
    for task, arm, found in _groups(runs):
        if prompts == "own" and arm == "noise":
            continue
        low, high = interval(found, prompts)
        cells = [_seeds(slope(_values(run, name, prompts)) for run in found) for name in QUANTITIES]
        cells[0] = cells[0].replace(" (", f", {low:.2f} to {high:.2f} (", 1)
        rows.append((task, arm, *cells))
    return table(["task", "changed by", *QUANTITIES.values()], rows)


def _values(run: Run, name: str, prompts: str) -> list[float]:
    found: list[float] = run.update if name == "update" else getattr(getattr(run, prompts), name)
    return found


def _seeds(values: Iterable[Floats]) -> str:
    found = [float(value) for value in values]
    return f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def _late(runs: Sequence[Run]) -> str:
    rows = [
        (
            task,
            arm,
            *(f"{np.mean([late_share(_values(r, n, 'general')) for r in found]):.0%}" for n in QUANTITIES),
        )
        for task, arm, found in _groups(runs)
    ]
    return table(["task", "changed by", *QUANTITIES.values()], rows)


def _retained(runs: Sequence[Run]) -> str:
    """How much of the slope the control leaves."""
    told = []
    for task in TASKS:
        both = [
            [slope(run.general.divergence) for run in runs if (run.task, run.arm) == (task, arm)]
            for arm in ARMS[:2]
        ]
        told.append(f"{np.mean(both[1]) / np.mean(both[0]):.0%} on {task}")
    return f"Equal steps leave of the slope of divergence {', '.join(told)}."


def _without_the_first(runs: Sequence[Run]) -> str:
    """What the first block, whose input is the embedding alone, has to do with the slope of local change."""
    trained = [run for run in runs if run.losses]
    slopes = [float(slope(run.general.local[1:])) for run in trained]
    return (
        f"Without the first block, the slope of local change is {min(slopes):.2f} to {max(slopes):.2f} "
        f"over the {len(trained)} trained models."
    )


def draw(runs: Sequence[Run], path: Path) -> None:
    """The profiles on general prompts, each over its mean: a panel a quantity, a line a way of changing."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = {"divergence": "Divergence", "local": "Local change", "update": "‖ΔW‖ / ‖W‖"}
    styles = dict(zip(ARMS, ("-", "--", ":"), strict=True))
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for arm in ARMS:
            found = np.array([_values(run, name, "general") for run in runs if run.arm == arm])
            axes.plot((found / found.mean(1, keepdims=True)).mean(0), styles[arm], label=arm)
        axes.set(title=title, xlabel="Layer", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
