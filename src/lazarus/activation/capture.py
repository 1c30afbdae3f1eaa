"""record: the hidden states of one model, written down as they come."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from lazarus.activation.llama_cpp import position_to_record, prompts_to_record, record_in_llama_cpp
from lazarus.activation.measure import Job, Part, note_reused, shared_parts
from lazarus.activation.prepare import Observer, Prepared, prepare_alone, read_asked, take_up
from lazarus.activation.recorded_rows import RECORDED_COMPONENTS
from lazarus.activation.run import Prompts, Silence, given_for
from lazarus.facts import ComponentSite
from lazarus.loading import Model
from lazarus.metrics import AccumulatorState, TopTokens
from lazarus.models import LoadedModel, tokenizer_digest
from lazarus.notes import Notes
from lazarus.options import RecordArguments, RecordOptions
from lazarus.provenance import environment
from lazarus.ranks import Rank, find_rank
from lazarus.reading import Reading
from lazarus.recorded import as_array
from lazarus.recordings import (
    LOGITS,
    TOP_IDS,
    TOP_LOGPROBS,
    Array,
    Claim,
    Contents,
    RecordedModel,
    RecordedTokenizer,
    Recording,
    Runtime,
    Shard,
    TensorWriter,
    make_folder,
    ordered,
    remove_written,
    site_name,
    write_manifest,
)
from lazarus.recordings.llama_cpp import RUNTIME
from lazarus.results.anonymous import anonymised
from lazarus.shards import Shard as RunShard
from lazarus.shards import WorkFolder, run_shards, states
from lazarus.sites import StatePair, tokens_of

MOST_BYTES = 2**30
"""From so many bytes on, a recording of a model in memory goes into another file."""


def record(
    model: Model,
    prompts: Prompts,
    folder: str | Path,
    *,
    tokenizer: Any | None = None,
    observer: Observer | None = None,
    rank: Rank | None = None,
    **options: Unpack[RecordArguments],
) -> Recording:
    """Run prompts through a model, and write its hidden states at every layer to a folder.

    Args:
        model: as for `activation_diff`.
        prompts: as for `activation_diff`.
        folder: is made; it must be empty, unless a run is taken up with `work_dir`.
        tokenizer: the tokenizer of a model in memory, or a folder or Hub id that holds it.
        observer: is told how far the run has come.
        rank: which of several processes this one is, instead of what the environment says.
        options: the command line's options, with underscores: `position="last"`, `logits=True`.

    Returns:
        The recording, which takes the place of the model in `activation_diff` and `compare`.

    Raises:
        UsageError: an option, the prompts or the folder are wrong.
        LazarusError: as `activation_diff`.
    """
    chosen = RecordOptions.make(**options)
    watcher = observer or Silence()
    given = given_for((model, model), prompts, tokenizer, rank or find_rank(), chosen.of_pair())
    path = make_folder(folder, taken_up=given.folder is not None)
    if chosen.runtime == RUNTIME:
        return record_in_llama_cpp(given, model, chosen, path, watcher)

    def read(loaded: LoadedModel, notes: Notes) -> Reading:
        watcher.testing(given.prompts.prompts)
        return read_asked(given, (loaded, loaded), notes)

    prepared = prepare_alone(given, model, "base", watcher, read)
    with given.running():
        return Capture(prepared, chosen, path, watcher).run()


@dataclass(frozen=True)
class Written:
    """A file of tensors: the prompts in it, the sites of each, and its size."""

    prompts: list[int]
    sites: set[str]
    n_bytes: int

    def state(self) -> AccumulatorState:
        """Return it as what the folder of a shared run keeps of a shard."""
        sites = np.array(sorted(self.sites))
        return {"prompts": np.array(self.prompts), "sites": sites, "n_bytes": np.array(self.n_bytes)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Written:
        """Return it from its `state`."""
        return cls(state["prompts"].tolist(), set(state["sites"].tolist()), int(state["n_bytes"]))


class Capture:
    """One run of a model, and the folder that its states go to."""

    def __init__(self, prepared: Prepared, options: RecordOptions, path: Path, watcher: Observer) -> None:
        self._prepared, self._options, self._path = prepared, options, path
        self._notes = Notes(prepared.notes)
        pair = prepared.pair if options.logits else prepared.pair.without_output()
        self._run = replace(prepared.run, position=position_to_record(options, prepared.reading))
        self.job = Job(pair, self._run, watcher.advanced)
        watcher.running(self.job.whole.n_tokens)

    def run(self) -> Recording:
        """Run all prompts, and write recording.json when all of their states are there."""
        folder = self._prepared.given.folder
        into = {
            "logits": str(self._options.logits and self._options.top_k),
            "into": str(self._path.resolve()),
        }
        take_up(self._prepared, self._run, into)
        with nullcontext() if folder else Claim(self._path), ExitStack() as undo:
            if folder is None:  # else what is done is kept
                undo.callback(remove_written, self._path)
            found = self._alone() if folder is None else self._shared(folder)
            self._conclude(found)
            undo.pop_all()
        return Recording.open(self._path)

    def _alone(self) -> list[Written]:
        parts = self.job.whole.cut(1 if self.job.pair.streams else self._n_files())
        return [self.write(part, number) for number, part in enumerate(parts)]

    def _shared(self, folder: WorkFolder) -> list[Written]:
        """Write files that the folder of the run keeps count of, by however many processes."""
        parts = shared_parts(self.job, folder)
        shards = [RunShard(i, part.prompts, part.n_tokens) for i, part in enumerate(parts)]
        for shard in shards:
            if not self._file(shard.number).exists():
                folder.forget(shard.number)

        def run_shard(shard: RunShard) -> AccumulatorState:
            return self.write(parts[shard.number], shard.number).state()

        n_before = run_shards(folder, shards, run_shard, self.job.advanced)
        self._notes.extend(note_reused(n_before, len(shards), folder))
        return [Written.of(state) for state in states(folder, shards)]

    def write(self, part: Part, number: int) -> Written:
        """Run a part of the prompts, and write its file."""
        repeats, sites, held = self._run.repeats, set[str](), dict[str, list[Tensor]]()
        own = [index for prompt in part.prompts for index in (prompt, *repeats.others.get(prompt, ()))]
        n_sites = 4 * self.job.pair.n_layers[0] + 3  # a block and what is inside it, and what is outside
        with TensorWriter(self._file(number), len(own) * n_sites) as writer:
            for pair in self._pairs(part):
                name = site_name(pair.site)
                for prompt, rows in _by_prompt(pair):
                    # Logits come in parts; all other rows of a prompt at once.
                    pieces = held.setdefault(f"{prompt}/{name}", [])
                    pieces.append(rows)
                    if sum(map(len, pieces)) == self._n_kept(prompt):
                        whole = torch.cat(held.pop(f"{prompt}/{name}"))
                        for site, array in self._arrays(name, whole).items():
                            sites.add(site)
                            writer.put(f"{prompt}/{site}", array)
        assert not held, sorted(held)
        return Written(own, sites, writer.n_bytes)

    def _pairs(self, part: Part) -> Iterator[StatePair]:
        for pair in self.job.run(part):
            if not isinstance(pair.site, ComponentSite) or pair.site.name in RECORDED_COMPONENTS:
                yield from self._run.repeats.spread(pair)

    def _arrays(self, name: str, rows: Tensor) -> dict[str, Array]:
        """Return the rows of a site as they are written; of logits, the likeliest tokens."""
        if name != LOGITS or not self._options.top_k:
            return {name: as_array(rows)}
        top = TopTokens.of(rows, self._options.top_k)
        return {TOP_IDS: top.ids.int().numpy(), TOP_LOGPROBS: top.logprobs.numpy()}

    def _conclude(self, found: Sequence[Written]) -> None:
        prepared, info = self._prepared, self._prepared.facts.base.info
        self._run.note(self._notes)
        files = prepared.pair.base.files.told(self._notes)
        conventions, tokenizer = prepared.pair.base_conventions, prepared.reading.tokenizers[0]
        shards = [
            Shard(file=self._file(number).name, prompts=written.prompts, n_bytes=written.n_bytes)
            for number, written in enumerate(found)
        ]
        contents = Contents(
            model=RecordedModel(
                id=info.id,
                revision=info.revision,
                architecture=info.architecture,
                n_layers=info.n_layers,
                hidden_size=conventions.width,
                stored_dtype=info.stored_dtype,
                run_dtype=info.run_dtype,
                attention=info.attention,
                adapter=info.adapter,
                causal=conventions.causal,
                layer_norm=prepared.facts.base.uses_layer_norm,
                files=files,
            ),
            runtime=_runtime(prepared),
            tokenizer=RecordedTokenizer(sha256=tokenizer_digest(tokenizer)),
            positions="all" if self._run.position == "every" else "compared",
            sites=ordered({site for written in found for site in written.sites}),
            prompts=list(prompts_to_record(self._prepared.reading, self._run.position)),
            shards=shards,
            notes=self._notes.texts,
        )
        write_manifest(self._path, anonymised(contents) if self._options.anonymous else contents)

    def _n_kept(self, prompt: int) -> int:
        return len(tokens_of(self._prepared.reading.base[prompt], self._run.position))

    def _n_files(self) -> int:
        """Return into how many files the states go, by their size."""
        return max(1, int(-(-self.n_bytes // MOST_BYTES)))

    @property
    def n_bytes(self) -> int:
        """Return the size of the states outside of blocks and after each."""
        pair = self.job.pair
        n_rows = sum(self._n_kept(prompt) for prompt in self._run.repeats.distinct)
        return int(n_rows * (pair.n_layers[0] + 2) * pair.widths[0] * pair.base.model.dtype.itemsize)

    def _file(self, number: int) -> Path:
        return self._path / f"{number:05d}.safetensors"


def _by_prompt(pair: StatePair) -> Iterator[tuple[int, Float[Tensor, "rows width"]]]:
    """Yield the rows of each prompt of a pair."""
    prompts, counts = torch.unique_consecutive(pair.prompts, return_counts=True)
    yield from zip(prompts.tolist(), torch.split(pair.base.cpu(), counts.tolist()), strict=True)


def _runtime(prepared: Prepared) -> Runtime:
    found = environment(prepared.given.device)
    details = {
        "torch": found.torch,
        "python": platform.python_version(),
        "attention": str(prepared.facts.base.info.attention),
        "threads": str(found.n_threads),
        "hardware": found.device_name,
    }
    device = str(prepared.given.device)
    return Runtime(name="transformers", version=transformers.__version__, device=device, details=details)
