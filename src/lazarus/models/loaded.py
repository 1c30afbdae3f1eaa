"""A model in memory, with all that the rest of the program asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazarus.models.anatomy import Anatomy
from lazarus.models.contents import Unread
from lazarus.models.files import ReadFiles
from lazarus.models.pager import Pager
from lazarus.models.quantised import Codes
from lazarus.models.reference import Source
from lazarus.notes import Note
from lazarus.results import ModelInfo, NotCompared


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its parts named."""

    name: str
    kind: Literal["hub", "folder", "gguf", "adapter", "loaded"]
    model: PreTrainedModel
    anatomy: Anatomy
    source: Source | None = None
    tokenizer_sources: tuple[Source, ...] = ()
    adapter: str | None = None
    left_out: Mapping[str, Tensor] = field(default_factory=dict)
    """what an adapter brings and the model has no place for"""
    revision: str | None = None
    stored_dtype: str | None = None
    notes: tuple[Note, ...] = ()
    codes: Codes | None = None
    """the quantisation of its weights, where they are decoded as they are read"""
    pager: Pager | None = None
    """reads its blocks when they are needed; None where all of it is in memory"""
    unread: tuple[Unread, ...] = ()
    """other sets of weights in its folder"""
    untaken: Mapping[str, Any] = field(default_factory=dict)
    """settings of its GGUF file that it runs without"""
    missing: frozenset[str] = frozenset()
    """its tensors that no file holds"""
    files: ReadFiles = field(default_factory=lambda: ReadFiles(""))
    """what it was read from"""

    @property
    def run_dtype(self) -> str:
        """Return the dtype in which it runs, such as `float32`."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Return where it runs."""
        return self.model.device if self.pager is None else self.pager.device

    def finish_reading(self) -> None:
        """Add the files of the tokenizer, which has been read by now, check all, and begin with the digests.

        Raises:
            WeightsError: a file has changed since it was read.
        """
        for source in self.tokenizer_sources:
            if source.is_on_hub and (found := source.file("tokenizer_config.json")) is not None:
                # They were fetched when they were read, and not there before.
                self.files.add_settings(Path(found).parent, source.prefix)
        if self.pager is None:
            self.files.all_read()
        if self.files.hashed:
            self.files.start_hashing()

    def info(self, n_layers: int, not_compared: Sequence[NotCompared] = ()) -> ModelInfo:
        """Describe it as it was run, for a result: with its number of blocks, and what was not compared."""
        return ModelInfo(
            id=self.name,
            revision=self.revision,
            kind=self.kind,
            architecture=type(self.model).__name__,
            n_layers=n_layers,
            hidden_size=self.anatomy.hidden_size,
            stored_dtype=self.stored_dtype,
            run_dtype=self.run_dtype,
            attention=getattr(self.model.config, "_attn_implementation", None),
            adapter=self.adapter,
            not_compared=list(not_compared),
        )
