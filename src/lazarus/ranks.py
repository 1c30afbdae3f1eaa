"""The rank of this process among several, as torchrun or Slurm gives it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lazarus.errors import UsageError

_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Rank:
    """One process of `world`: its number, and its number on its machine, from 0."""

    number: int = 0
    world: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Return whether it is the one that prints, saves and holds the gates."""
        return self.number == 0


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """This process among those that were started together; alone where nothing says otherwise.

    Raises:
        UsageError: the environment's numbers are no numbers, or do not fit each other.

    >>> find_rank({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"})
    Rank(number=3, world=8, local=1)
    """
    for number, world, local in _LAUNCHERS:
        if number in environment and world in environment:
            given = {name: environment.get(name, "0") for name in (number, world, local)}
            rank = _checked(given)
            # A launcher of a single process may run under another one of several.
            if rank.world > 1:
                return rank
    return Rank()


def _checked(given: Mapping[str, str]) -> Rank:
    told = ", ".join(f"{name}={value}" for name, value in given.items())
    if not all(value.isdecimal() for value in given.values()):
        raise UsageError(f"{told}: numbers of processes are expected. Unset them to run one process.")
    rank = Rank(*map(int, given.values()))
    if rank.number >= max(rank.world, 1):
        raise UsageError(f"{told}: there is no such process. Unset them to run one process.")
    return rank
