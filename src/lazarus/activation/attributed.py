"""The parts of changed parameters in KL(base‖fine-tuned), and what a result tells of them. No model here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lazarus.results import AttributedGroup, Attribution, Restored
from lazarus.statistics import signed_intervals

Floats = NDArray[np.float64]
MOST_ERROR = 0.01
"""The share of the KL by which the sum may miss it."""
_RESOLUTION = 1e-7
"""Nats below this are rounding of float32."""


@dataclass(frozen=True)
class Group:
    """Changed parameters whose parts are told as one."""

    name: str
    layer: int | None
    changes: tuple[int, ...]
    component: str | None = None
    """of a single tensor, its standard name"""


@dataclass(frozen=True)
class Attributed:
    """The parts of all changed parameters in the KL of each prompt."""

    parts: Floats
    """[changes, prompts], in nats"""
    kl: Floats
    """KL(base‖fine-tuned) of each prompt, from passes of its own"""
    n_points: int
    groups: Sequence[Group]
    restored: Sequence[tuple[tuple[str, ...], float]] = ()
    """groups that were set back to base, and the mean KL that is left"""

    @property
    def total(self) -> float:
        """Return the sum of all parts, as a mean over prompts."""
        return float(self.parts.sum(0).mean())

    @property
    def completeness_error(self) -> float:
        """Return by which share of the KL the sum of all parts misses it; 0 where nothing changed."""
        kl = float(self.kl.mean())
        return abs(self.total - kl) / kl if kl else abs(self.total)

    @property
    def is_rough(self) -> bool:
        """Return whether the sum misses the KL by more than 1 %, and by more than float32 can tell."""
        missed = self.completeness_error * float(self.kl.mean())
        return self.completeness_error > MOST_ERROR and missed > _RESOLUTION

    def of_group(self, group: Group) -> Floats:
        """Return a group's part in the KL of each prompt, [prompts]."""
        found: Floats = self.parts[list(group.changes)].sum(0)
        return found

    def by_layer(self, n_layers: int) -> Floats:
        """Return the part of every block in the KL of each prompt, [prompts, layers]."""
        found = np.zeros((self.parts.shape[1], n_layers))
        for group in self.groups:
            if group.layer is not None:
                found[:, group.layer] += self.of_group(group)
        return found

    def record(self, seed: int) -> Attribution:
        """Return what a result tells."""
        values = [self.of_group(group) for group in self.groups]
        ends = signed_intervals(np.stack(values, axis=1), seed) if values else None
        total = self.total
        return Attribution(
            kl=float(self.kl.mean()),
            sum=total,
            completeness_error=self.completeness_error,
            n_points=self.n_points,
            groups=[
                AttributedGroup(
                    name=group.name,
                    layer=group.layer,
                    component=group.component,
                    nats=float(value.mean()),
                    share=float(value.mean()) / total if total else None,
                    interval=None if ends is None else (float(ends[0][i]), float(ends[1][i])),
                )
                for i, (group, value) in enumerate(zip(self.groups, values, strict=True))
            ],
            restored=[Restored(groups=list(names), kl=kl) for names, kl in self.restored],
        )
