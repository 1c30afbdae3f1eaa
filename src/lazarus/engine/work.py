"""A piece of work: what is run through the pair, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lazarus.batches import BatchPair, TokenBatch
from lazarus.engine.forced import GivenStates
from lazarus.engine.kept import KeptStates
from lazarus.engine.noise import NoisePlan
from lazarus.sites import Position


@dataclass(frozen=True)
class Work:
    """Batches for both models, and a sample of their prompts for base against itself."""

    batches: Sequence[BatchPair]
    sample: Sequence[TokenBatch]
    noise: NoisePlan
    position: Position
    localize: bool
    again: Sequence[TokenBatch] = ()
    """batches with prompts of the sample, here for base alone: both models run them elsewhere"""
    given: GivenStates | None = None
    """of a model that runs alone: the states of another run, on which its blocks run too, each by itself"""
    nudge: torch.Generator | None = None
    """of a model that runs alone: what enters its first block is moved by one unit in the last place"""
    kept: KeptStates | None = None
    """base's rows from an earlier run against it; of a pair in memory"""
