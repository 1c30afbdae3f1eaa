"""The figures of `benchmarks.trust`, as records."""

from __future__ import annotations

from msgspec import Struct

from benchmarks.results import Machine


class Truth(Struct, frozen=True):
    """What was found of a pair whose truth is known; `verdict` is the line of the summary."""

    name: str
    dtype: str
    verdict: str
    onset: int | None
    most_divergent: int | None
    most_changed: int | None
    divergence: list[float]
    local: list[float]


class Null(Struct, frozen=True):
    """Runs against function-preserving copies; the ratios are of the largest relative L2 to its floor."""

    name: str
    dtype: str
    n_runs: int
    n_changed: int
    ratio_median: float
    ratio_95: float
    ratio_highest: float


class Power(Struct, frozen=True):
    """Runs against a base with one block changed by a share of its norm."""

    dtype: str
    share: float
    n_runs: int
    n_changed: int


class Coverage(Struct, frozen=True):
    """How often the interval held the mean of all prompts: the worst layer, all, and the best."""

    dtype: str
    n_draws: int
    lowest: float
    mean: float
    highest: float


class ReadLayer(Struct, frozen=True):
    """The tokens that the mean difference promotes at a layer, and how many of them are of the subject."""

    name: str
    position: str
    layer: int
    promoted: list[str]
    n_subject: int
    static_share: float | None


class Cost(Struct, frozen=True):
    """Seconds of one round."""

    dtype: str
    bare: float
    without_noise: float
    default: float
    everything_else: float
    localized: float

    def told(self) -> str:
        """The ratios that the targets are about."""
        return (
            f"everything but --localize / bare {self.everything_else / self.bare:.2f}, "
            f"--localize / without {self.localized / self.default:.2f}"
        )


class Trust(Struct):
    """All of it."""

    machine: Machine | None = None
    truth: list[Truth] = []
    null: list[Null] = []
    power: list[Power] = []
    coverage: Coverage | None = None
    readout: list[ReadLayer] = []
    cost: list[Cost] = []
