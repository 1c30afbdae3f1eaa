"""The compared rows of every model of a series, in files: one model is in memory, and all are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lazarus.facts import ComponentSite, Site
from lazarus.recorded import as_array
from lazarus.recordings import TensorReader, TensorWriter
from lazarus.sites import StatePair
from lazarus.trajectory.distances import Distances, squared_distance

PIECE_BYTES = 2**20
"""Rows of a site wait in memory until they are so many bytes."""
MOST_LOGITS_BYTES = 2**31
"""Logits of more are not kept for the comparison with the next member."""
MOST_TENSORS = 4_000
"""for which there is room in a file's header"""
_LOGITS = "logits"
_PROMPTS = "prompts"


class RowWriter:
    """Takes one side's rows out of the pairs that pass, and writes them to a file."""

    def __init__(self, path: Path) -> None:
        """Begin the file."""
        self._writer = TensorWriter(path, MOST_TENSORS)
        self._waiting: dict[Site, list[Tensor]] = defaultdict(list)
        self._owners: dict[Site, list[Tensor]] = defaultdict(list)
        self._n_pieces: dict[Site, int] = defaultdict(int)
        self._n_logits_bytes = 0
        self.n_bytes = 0
        """of all rows that it was given"""

    def take(self, site: Site, prompts: Tensor, rows: Tensor) -> None:
        """Take in rows of a site: [rows, width], and whose they are."""
        self.n_bytes += rows.numel() * rows.element_size()
        if site == _LOGITS:
            self._n_logits_bytes += rows.numel() * rows.element_size()
            if self._n_logits_bytes > MOST_LOGITS_BYTES:
                return
        self._owners[site].append(prompts.cpu())
        self._waiting[site].append(rows.detach().cpu())
        n_waiting = sum(part.numel() * part.element_size() for part in self._waiting[site])
        # Larger the more there are, so that the header has room for all.
        if n_waiting >= PIECE_BYTES * (1 + self._n_pieces[site]):
            self._flush(site)

    def close(self) -> None:
        """Write what is left; the file appears.

        Raises:
            SaveError: the disk gave out.
        """
        too_many = self._n_logits_bytes > MOST_LOGITS_BYTES
        for site in [*self._owners]:
            self._flush(site)
            # Without its owners a site is not there: of too many logits none are.
            if not (site == _LOGITS and too_many):
                owners = torch.cat(self._owners[site]).numpy().astype(np.int64)
                self._writer.put(f"{site}/{_PROMPTS}", owners)
        self._writer.close()

    def discard(self) -> None:
        """Remove what was written."""
        self._writer.discard()

    def _flush(self, site: Site) -> None:
        if self._waiting[site]:
            rows = torch.cat(self._waiting.pop(site))
            self._writer.put(f"{site}/{self._n_pieces[site]}", as_array(rows))
            self._n_pieces[site] += 1


class KeptRows:
    """The rows of one model, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def at(self, site: Site) -> tuple[NDArray[np.int64], NDArray[np.floating]] | None:
        """Return whose the rows of a site are, and the rows, prompt by prompt; None where there are none.

        Raises:
            RecordingError: the file was damaged since it was written.
        """
        reader = self._reader
        if not self.has(site):
            return None
        owners = reader.read(f"{site}/{_PROMPTS}")
        n_pieces = sum(name.startswith(f"{site}/") for name in reader.specs) - 1
        rows = np.concatenate([reader.read(f"{site}/{i}") for i in range(n_pieces)])
        # Batches come in an order of their own.
        order = np.argsort(owners, kind="stable")
        return owners[order], rows[order]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each site, with whose the rows are."""
        found: dict[str, int] = defaultdict(int)
        for name, spec in self._reader.specs.items():
            found[name.rpartition("/")[0]] += spec.n_bytes
        return found

    @property
    def n_rows(self) -> int:
        """Return how many rows there are of a site."""
        return self._reader.specs[f"embedding/{_PROMPTS}"].shape[0]

    def has(self, site: Site) -> bool:
        """Return whether there are rows of a site."""
        return f"{site}/{_PROMPTS}" in self._reader.specs

    @cached_property
    def _reader(self) -> TensorReader:
        # Once for all sites: reading the header takes longer than reading a few rows.
        return TensorReader(self.path)


def tapped(pairs: Iterator[StatePair], base: RowWriter | None, finetuned: RowWriter) -> Iterator[StatePair]:
    """Let pairs pass, and take the rows of the fine-tuned model, and of base where these are wanted."""
    for pair in pairs:
        if pair.trial is None and not isinstance(pair.site, ComponentSite):
            finetuned.take(pair.site, pair.prompts, pair.finetuned)
            if base is not None and pair.site != _LOGITS:
                base.take(pair.site, pair.prompts, pair.base)
        yield pair


def pairs_of(one: KeptRows, other: KeptRows, sites: list[Site]) -> Iterator[StatePair]:
    """Yield the pairs of two models' kept rows, at the sites that both have."""
    everywhere: list[Site] = [*sites, "logits"]
    for site in everywhere:
        ours, theirs = one.at(site), other.at(site)
        if ours is None or theirs is None or not np.array_equal(ours[0], theirs[0]):
            continue
        if site == _LOGITS and ours[1].shape != theirs[1].shape:
            continue  # of two vocabularies
        yield StatePair.of(site, ours[0], ours[1], theirs[1])


def add_distances(distances: Distances, kept: list[KeptRows]) -> None:
    """Take in the distances of the last model of a list to all others; the first one is base."""
    *others, last = kept
    place = len(others)
    for number, site in enumerate(distances.sites):
        own = last.at(site)
        for index, other in enumerate(others):
            theirs = other.at(site)
            if own is None or theirs is None or own[1].shape != theirs[1].shape:
                continue
            if np.array_equal(own[0], theirs[0]):
                distances.put(site, (index, place), squared_distance(own[1], theirs[1]))
            if not index and np.isnan(distances.scale[number]):
                distances.scale[number] = squared_distance(theirs[1], np.zeros_like(theirs[1]))
