"""`Recording`: hidden states of one model on some prompts, on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from numpy.typing import NDArray

from lazarus.errors import PromptsError, RecordingError, UsageError
from lazarus.foreign import user_path
from lazarus.prompts import EXAMPLE
from lazarus.recordings.folder import Claim, make_folder, write_manifest
from lazarus.recordings.format import (
    MANIFEST,
    Contents,
    RecordedModel,
    RecordedPrompt,
    RecordedTokenizer,
    Runtime,
    Shard,
    bad_prompt,
    contradiction_of_sites,
    decode,
)
from lazarus.recordings.sites import KNOWN_SITE, TOP_IDS, TOP_LOGPROBS, in_stream
from lazarus.recordings.tensors import Array, BFloat16Bits, Spec, TensorReader, TensorWriter

SHARD_BYTES = 2**28
"""From so many bytes on, prompts that are added go into another file."""


def is_recording(path: str | Path) -> bool:
    """Return whether a path is a folder with a recording.json."""
    return user_path(path).joinpath(MANIFEST).is_file()


def check_brought(prompts: object | None, models: Sequence[object]) -> None:
    """Refuse a comparison without prompts, unless a recording brings them.

    Raises:
        PromptsError: there are none, and no MODEL is a recording.
    """
    if prompts is None and not any(isinstance(m, str | Path) and is_recording(m) for m in models):
        raise PromptsError(f"No prompt: neither model is a recording, which would bring its own. {EXAMPLE}")


class Recording:
    """A recording that is there: its prompts, its sites, and the states of each."""

    def __init__(self, path: Path, contents: Contents) -> None:
        """Take a folder and what its recording.json says; see `open` and `create`."""
        self.path = path
        self.contents = contents
        self._shard_of = {index: shard for shard in contents.shards for index in shard.prompts}
        self._readers: dict[str, TensorReader] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Recording:
        """Open a recording, and check that all of it is there.

        Args:
            folder: one that holds `recording.json`.

        Raises:
            RecordingError: it is no recording, of a later version of the format, damaged, or cut short.
        """
        path = user_path(folder)
        found = cls(path, decode(path / MANIFEST))
        for shard in found.contents.shards:
            found._check(shard)
        return found

    @staticmethod
    def create(
        folder: str | Path,
        *,
        model: str,
        n_layers: int,
        hidden_size: int,
        run_dtype: str = "float32",
        runtime: str = "unknown",
        **known: Any,
    ) -> RecordingWriter:
        """Begin a recording; prompts are added one by one, and it is there when it is closed.

        Args:
            folder: is made; it must be empty.
            model: what the model is called.
            n_layers: how many blocks it has.
            hidden_size: the width of its residual stream.
            run_dtype: the type in which states were computed: float32, bfloat16, float16.
            runtime: the software that runs it.
            known: what else is known: `revision`, `architecture`, `stored_dtype`, `attention`, `adapter`,
                `causal`, `layer_norm` of the model; `runtime_version`, `device` and `details` (a mapping of
                texts) of the runtime; `tokenizer_sha256`; `notes`.

        Raises:
            UsageError: the folder holds something, or cannot be written; or something is known that has no
                place in a recording.
        """
        names = {field for field in RecordedModel.__struct_fields__ if field in known}
        of_model = {name: known.pop(name) for name in names}
        of_runtime = {"version": known.pop("runtime_version", None), "device": known.pop("device", None)}
        details, notes = known.pop("details", {}), known.pop("notes", [])
        sha256 = known.pop("tokenizer_sha256", None)
        if known:
            raise UsageError(f"Recording.create: {', '.join(known)} has no place in a recording.")
        about = Contents(
            model=RecordedModel(
                id=model, n_layers=n_layers, hidden_size=hidden_size, run_dtype=run_dtype, **of_model
            ),
            runtime=Runtime(name=runtime, **of_runtime, details=details),
            tokenizer=RecordedTokenizer(sha256=sha256) if sha256 else None,
            positions="all",
            sites=[],
            prompts=[RecordedPrompt(index=0, ids=[0])],  # those that are added take its place
            shards=[],
            notes=list(notes),
        )
        return RecordingWriter(folder, about)

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return str(self.path)

    @property
    def prompts(self) -> Sequence[RecordedPrompt]:
        """The prompts, in their order."""
        return self.contents.prompts

    @property
    def sites(self) -> Sequence[str]:
        """The names of its sites: `embedding`, `resid_post.N`, `final_norm`, ..."""
        return self.contents.sites

    def rows(self, prompt: int, site: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return the states of one prompt at one site, [tokens kept, hidden], or rows of them.

        They are in the type in which they were recorded; bfloat16 is widened to float32, which is exact.

        Args:
            prompt: the index of the prompt.
            site: the name of the site.
            start: the first row.
            stop: the row after the last one; None for all.

        Raises:
            RecordingError: the file has changed since it was opened.
            KeyError: there is no such prompt or site.
        """
        return self._reader(self._shard_of[prompt]).read(f"{prompt}/{site}", start, stop)

    def summary(self) -> str:
        """Return in a line how much it holds."""
        n_tokens = sum(len(prompt.kept) for prompt in self.prompts)
        n_bytes = sum(self.path.joinpath(shard.file).stat().st_size for shard in self.contents.shards)
        prompts = "1 prompt" if len(self.prompts) == 1 else f"{len(self.prompts)} prompts"
        return (
            f"Recorded: {len(self.sites)} sites at {n_tokens:,} tokens of {prompts}, computed in "
            f"{self.contents.model.run_dtype}, {n_bytes / 1e6:,.1f} MB"
        )

    def digest(self) -> str:
        """Return what names the recording: a SHA-256 of recording.json, and of when its files changed.

        Another recording of the same model, of other weights, may have the very same recording.json.
        """
        found = hashlib.sha256(self.path.joinpath(MANIFEST).read_bytes())
        for shard in self.contents.shards:
            found.update(f"{shard.file} {self.path.joinpath(shard.file).stat().st_mtime_ns}".encode())
        return found.hexdigest()

    def _reader(self, shard: Shard) -> TensorReader:
        if shard.file not in self._readers:
            self._readers[shard.file] = TensorReader(self.path / shard.file)
        return self._readers[shard.file]

    def _check(self, shard: Shard) -> None:
        """Check that a file holds every site of its prompts, in the right shape, and nothing else."""
        path, sites = self.path / shard.file, self.contents.sites
        specs = self._reader(shard).specs
        size = path.stat().st_size
        if shard.n_bytes is not None and size != shard.n_bytes:
            raise RecordingError(f"{path}: {size:,} bytes, and {MANIFEST} says {shard.n_bytes:,}. {_AGAIN}")
        wanted = {f"{index}/{site}" for index in shard.prompts for site in sites}
        if wanted != specs.keys():
            odd = min(wanted ^ specs.keys())
            which = "lacks" if odd in wanted else "has beside what recording.json lists"
            raise RecordingError(f"{path}: it {which} the tensor {odd!r}. {_AGAIN}")
        widths = {site: specs[f"{shard.prompts[0]}/{site}"].shape[-1:] for site in sites}
        if TOP_IDS in widths and widths[TOP_LOGPROBS] != (widths[TOP_IDS][0] + 1,):
            raise RecordingError(
                f"{path}: {TOP_IDS} and {TOP_LOGPROBS} are {list(widths[TOP_IDS])} and "
                f"{list(widths[TOP_LOGPROBS])} wide, and the latter has one column more. {_AGAIN}"
            )
        for index in shard.prompts:
            n_kept = len(self.contents.prompts[index].kept)
            for site in sites:
                self._check_shape(path, f"{index}/{site}", specs, (n_kept, *widths[site]))

    def _check_shape(
        self, path: Path, name: str, specs: Mapping[str, Spec], expected: tuple[int, ...]
    ) -> None:
        spec, site = specs[name], name.partition("/")[2]
        is_stream = in_stream(site)
        width = self.contents.model.hidden_size if is_stream else expected[-1]
        if spec.shape != (expected[0], width) or not width:
            raise RecordingError(
                f"{path}: {name} has the shape {list(spec.shape)}, and {[expected[0], width]} is expected: "
                f"[tokens kept, {'hidden' if is_stream else 'width'}]. {_AGAIN}"
            )
        if spec.is_whole != (site == TOP_IDS):
            raise RecordingError(f"{path}: {name} is of type {spec.dtype}. {_AGAIN}")


_AGAIN = "Record again, or copy the file again."


class RecordingWriter:
    """A recording that is being written, one prompt at a time; `recording.json` comes last."""

    def __init__(self, folder: str | Path, about: Contents) -> None:
        self.path = make_folder(folder)
        self._claim = Claim(self.path)
        self._about = about
        self._prompts: list[RecordedPrompt] = []
        self._shards: list[Shard] = []
        self._sites: list[str] = []
        self._waiting: dict[str, Array] = {}
        self._widths: dict[str, int] = {}
        self._n_waiting = 0
        """how many of the last prompts are in memory"""

    def add(
        self,
        ids: Sequence[int],
        states: Mapping[str, Array],
        *,
        text: str | None = None,
        positions: Sequence[int] | None = None,
        group: str | None = None,
        rendered: str | None = None,
    ) -> None:
        """Add one prompt.

        Args:
            ids: its token ids, special tokens included.
            states: for each site, [tokens, hidden], in float32, float16, float64 or bfloat16 (that of
                `ml_dtypes`, or its bits as `BFloat16Bits`). Every prompt has the same sites.
            text: the prompt, where that is known.
            positions: the tokens of which there are states; None for all.
            group: the group of prompts that it belongs to.
            rendered: what a chat template made of it.

        Raises:
            UsageError: a site is not known, is missing, or has another shape or dtype than a recording has.
            SaveError: the disk gave out.
        """
        index = len(self._prompts)
        kept = None if positions is None else [int(p) for p in positions]
        prompt = _checked(
            RecordedPrompt(
                index=index,
                text=text,
                rendered=rendered,
                group=group,
                ids=[int(i) for i in ids],
                positions=None if kept == list(range(len(ids))) else kept,
            )
        )
        self._check_states(prompt, states)
        self._prompts.append(prompt)
        # Copied: a runtime may hand out the same buffer for every prompt.
        self._waiting |= {f"{index}/{site}": _copied(array) for site, array in states.items()}
        self._n_waiting += 1
        if sum(Spec.of(array).n_bytes for array in self._waiting.values()) >= SHARD_BYTES:
            self._flush()

    def close(self) -> Recording:
        """Write what is left, and recording.json.

        Returns:
            The recording, opened.

        Raises:
            UsageError: no prompt was added.
            SaveError: the disk gave out.
        """
        if not self._prompts:
            raise UsageError(f"{self.path}: a recording without a prompt. Add one before it is closed.")
        self._flush()
        found = msgspec.structs.replace(
            self._about,
            positions="compared" if any(prompt.positions for prompt in self._prompts) else "all",
            sites=self._sites,
            prompts=self._prompts,
            shards=self._shards,
        )
        write_manifest(self.path, found)
        self._claim.release()
        return Recording.open(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self._claim.release()

    def _flush(self) -> None:
        if not self._waiting:
            return
        file = f"{len(self._shards):05d}.safetensors"
        with TensorWriter(self.path / file, len(self._waiting)) as writer:
            for name, array in self._waiting.items():
                writer.put(name, array)
        last = len(self._prompts)
        prompts = list(range(last - self._n_waiting, last))
        self._shards.append(Shard(file=file, prompts=prompts, n_bytes=writer.n_bytes))
        self._waiting, self._n_waiting = {}, 0

    def _check_states(self, prompt: RecordedPrompt, states: Mapping[str, Array]) -> None:
        unknown = [site for site in states if not KNOWN_SITE.fullmatch(site)]
        if unknown:
            raise UsageError(
                f"{unknown[0]!r} is no site. They are embedding, resid_post.N, final_norm, logits."
            )
        if not self._sites:
            self._sites = list(states)
        if set(self._sites) != set(states):
            odd = min(set(self._sites) ^ set(states))
            raise UsageError(
                f"prompt {prompt.index}: every prompt has the same sites, and not all have {odd!r}."
            )
        why = contradiction_of_sites(self._sites, self._about.model.n_layers)
        if why is not None:
            raise UsageError(f"prompt {prompt.index}: {why}.")
        for site, array in states.items():
            try:
                spec = Spec.of(array)
            except (TypeError, AttributeError) as error:
                raise UsageError(f"prompt {prompt.index}, {site}: {error}.") from error
            self._check_spec(prompt, site, spec)
        if TOP_IDS in states and self._widths[TOP_LOGPROBS] != self._widths[TOP_IDS] + 1:
            raise UsageError(
                f"prompt {prompt.index}, {TOP_LOGPROBS}: {self._widths[TOP_LOGPROBS]} columns, and those of "
                f"{TOP_IDS} and one for all other tokens are needed: {self._widths[TOP_IDS] + 1}."
            )

    def _check_spec(self, prompt: RecordedPrompt, site: str, spec: Spec) -> None:
        n_kept, hidden = len(prompt.kept), self._about.model.hidden_size
        # The first prompt tells what width is not the residual stream's.
        width = (
            hidden if in_stream(site) else self._widths.get(site, spec.shape[-1] if spec.shape else 1) or 1
        )
        if spec.shape != (n_kept, width):
            raise UsageError(
                f"prompt {prompt.index}, {site}: an array of shape {list(spec.shape)}, and "
                f"[{n_kept}, {width}] is needed: a row a token."
            )
        if spec.is_whole != (site == TOP_IDS):
            raise UsageError(f"prompt {prompt.index}, {site}: an array of type {spec.dtype}.")
        self._widths[site] = width


def _checked(prompt: RecordedPrompt) -> RecordedPrompt:
    """Return a prompt, as it will be read back.

    Raises:
        UsageError: it cannot be written, or would be refused.
    """
    try:
        found = msgspec.json.decode(msgspec.json.encode(prompt), type=RecordedPrompt)
    except (msgspec.MsgspecError, UnicodeEncodeError, TypeError) as error:
        raise UsageError(f"prompt {prompt.index}: {error}.") from error
    why = bad_prompt(found)
    if why is not None:
        raise UsageError(f"{why}.")
    return found


def _copied(array: Array) -> Array:
    return BFloat16Bits(array.bits.copy()) if isinstance(array, BFloat16Bits) else array.copy()
