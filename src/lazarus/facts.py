"""Facts of two models that are known before their states are compared. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lazarus.notes import Notes
from lazarus.results import ModelInfo

ComponentName = Literal["attn_out", "mlp_out", "router", "experts"]
"""what attention, or whatever mixes tokens in its place, adds to the residual stream; what the MLP adds; the
router's logits; the experts that are picked"""


@dataclass(frozen=True)
class ComponentSite:
    """A component of a block."""

    layer: int
    name: ComponentName

    def __str__(self) -> str:
        return f"{self.layer}.{self.name}"


Site = int | ComponentSite | Literal["embedding", "final_norm", "logits"]
"""a layer by its number; a component of one; what enters the first block; what leaves the final norm; the
logits"""


def matched_layers(ours: int, theirs: int) -> list[int]:
    """Return, for each of `ours` layers, that of `theirs` at the same relative depth.

    >>> matched_layers(3, 5), matched_layers(1, 5)
    ([0, 2, 4], [4])
    """
    if ours == 1:  # first and last at once; what it ends with is what is compared
        return [theirs - 1]
    return [round(i * (theirs - 1) / (ours - 1)) for i in range(ours)]


class PairShape(ABC):
    """Two models of which the depths and the widths are known."""

    @property
    @abstractmethod
    def n_layers(self) -> tuple[int, int]:
        """The number of blocks of each model."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """The width of each model's residual stream."""

    @property
    @abstractmethod
    def have_final_norm(self) -> bool:
        """Return whether both models have a norm after their last block."""

    @property
    def same_width(self) -> bool:
        """Return whether a cosine between their states is defined."""
        return self.widths[0] == self.widths[1]

    @property
    def same_shape(self) -> bool:
        """Return whether they have as many blocks, of the same width."""
        return self.same_width and self.n_layers[0] == self.n_layers[1]

    @property
    def matched(self) -> list[int]:
        """Return the fine-tuned model's block at the same relative depth, for each block of base."""
        return matched_layers(*self.n_layers)

    @property
    def sites(self) -> list[Site]:
        """Every site of the residual stream, in the order in which the states reach it."""
        sites: list[Site] = ["embedding", *range(self.n_layers[0])]
        return [*sites, "final_norm"] if self.have_final_norm else sites

    def note_shapes(self, names: tuple[str, str], notes: Notes) -> None:
        """Note what two models of different shape cannot be asked."""
        ours, theirs = self.n_layers
        if ours != theirs:
            notes.add(
                "depths-differ",
                f"{names[0]} has {ours} layers, {names[1]} has {theirs}: they are matched by relative depth "
                "(finetuned_layer in JSON)",
            )
        if not self.same_width:
            notes.add(
                "widths-differ",
                f"residual streams of {self.widths[0]} and {self.widths[1]} features have no cosine: CKA is "
                "given instead",
            )


def note_dtypes(names: tuple[str, str], dtypes: tuple[str, str], notes: Notes) -> None:
    """Note that two models ran in different dtypes."""
    if dtypes[0] != dtypes[1]:
        notes.add(
            "run-dtypes",
            f"{names[0]} ran in {dtypes[0]}, {names[1]} in {dtypes[1]}: part of the divergence is the "
            "rounding of the narrower type",
        )


@dataclass(frozen=True)
class ModelFacts:
    """One of the two models."""

    info: ModelInfo
    width: int | None = None
    """the width of its residual stream, where that is not `info.hidden_size`"""
    is_causal: bool = True
    uses_layer_norm: bool = False
    """whether its blocks subtract the mean over features (LayerNorm), and not RMSNorm"""
    has_final_norm: bool = True
    why_no_head: str | None = None
    """why there are no logits; None where there are"""

    @classmethod
    def of(
        cls,
        name: str,
        n_layers: int,
        hidden_size: int,
        *,
        run_dtype: str = "float32",
        architecture: str = "unknown",
        has_final_norm: bool = False,
    ) -> ModelFacts:
        """Return the facts of a model that ran elsewhere, by what must be known of it."""
        info = ModelInfo(
            id=name,
            revision=None,
            kind="loaded",
            architecture=architecture,
            n_layers=n_layers,
            hidden_size=hidden_size,
            stored_dtype=None,
            run_dtype=run_dtype,
            attention=None,
            adapter=None,
        )
        return cls(info, has_final_norm=has_final_norm)

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return self.info.id


@dataclass(frozen=True)
class PairFacts(PairShape):
    """Two models that are compared: all that the result says of them, but for their states and weights."""

    base: ModelFacts
    finetuned: ModelFacts
    align: Literal["ids", "text"] = "ids"
    """whether both read the same token ids, or each its own of the same text"""
    why_no_scores: str | None = None
    """why scores or embeddings are not compared, where one of the two gives any"""
    replays: bool = False
    """whether `local` is what base's block makes of the fine-tuned model's states, held against what these
    are after it; else what the fine-tuned model's block makes of base's"""

    @property
    def n_layers(self) -> tuple[int, int]:
        """The number of blocks of each model."""
        return self.base.info.n_layers, self.finetuned.info.n_layers

    @property
    def widths(self) -> tuple[int, int]:
        """The width of each model's residual stream."""
        base, finetuned = (side.width or side.info.hidden_size for side in (self.base, self.finetuned))
        return base, finetuned

    @property
    def have_final_norm(self) -> bool:
        """Return whether both models have a norm after their last block."""
        return self.base.has_final_norm and self.finetuned.has_final_norm

    @property
    def names(self) -> tuple[str, str]:
        """Return what messages call each of the two: by its role too, where both have one name."""
        if self.base.name != self.finetuned.name:
            return self.base.name, self.finetuned.name
        return f"base ({self.base.name})", f"fine-tuned ({self.finetuned.name})"


@dataclass(frozen=True)
class Rounded:
    """One of two models is the other one, rounded."""

    stored: str
    """the name of the model that is the rounding"""
    exact: str
    dtype: str
    n_tensors: int
    kept: float | None
    """how much of the adapter's update the rounding has left, 1 for all of it; None without an adapter"""

    def __str__(self) -> str:
        told = f"{self.stored} is {self.exact}, rounded to {self.dtype}, in every tensor in which they differ"
        return f"{told} ({self.n_tensors})"


@dataclass(frozen=True)
class WeightFacts:
    """Facts of the weights on which two models run; by default nothing is known."""

    identical: bool | None = None
    """whether they are the same, bit for bit; None where that is not known"""
    causes: Sequence[str] = ()
    """why nothing may have changed, where nothing has"""
    rounding: Rounded | None = None
    """the model that is the other one, rounded; looked for where states differ by more than the noise"""


NOTHING_KNOWN = WeightFacts()
