"""recording.json: what a recording is of, and which file holds which prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from lazarus.errors import RecordingError
from lazarus.foreign import read_bytes
from lazarus.recordings.sites import KNOWN_SITE, TOP_IDS, TOP_LOGPROBS
from lazarus.results import ReadFile, write_json
from lazarus.results.rows import Record

MANIFEST = "recording.json"
FORMAT = "lazarus-recording"
FORMAT_VERSION = 1
_FILE = re.compile(r"(?!\.\.?$)[^/\\\0]+")
"""a file of its own folder"""
_MOST = 2**31 - 1
"""the largest token id"""


class RecordedModel(Record, frozen=True, kw_only=True):
    """The model that was run."""

    id: Annotated[str, Meta(description="as it is called: a Hub id, a path, a name")]
    revision: str | None = None
    architecture: Annotated[str, Meta(description="its class in transformers, or what its runtime says")] = (
        "unknown"
    )
    n_layers: Annotated[int, Meta(ge=1, description="blocks, in the order in which they run")]
    hidden_size: Annotated[int, Meta(ge=1, description="width of the residual stream")]
    stored_dtype: Annotated[str | None, Meta(description="type of most of the stored weights")] = None
    run_dtype: Annotated[str, Meta(description="type in which the states were computed")]
    attention: Annotated[str | None, Meta(description="attention implementation")] = None
    adapter: str | None = None
    causal: Annotated[bool | None, Meta(description="whether a token sees earlier tokens alone")] = None
    layer_norm: Annotated[
        bool | None, Meta(description="whether its norms subtract the mean over features")
    ] = None
    # Left out where it is not known, so that the checksum of older recordings holds.
    files: Annotated[list[ReadFile], Meta(description="what it was read from")] | UnsetType = UNSET


class Runtime(Record, frozen=True, kw_only=True):
    """The software that ran the model."""

    name: Annotated[str, Meta(description="transformers, llama.cpp, vllm, ...")]
    version: str | None = None
    device: str | None = None
    details: Annotated[
        dict[str, str], Meta(description="whatever else may matter: versions, kernels, threads")
    ] = {}  # noqa: RUF012 - msgspec copies it

    def __str__(self) -> str:
        return f"{self.name} {self.version}" if self.version else self.name


class RecordedTokenizer(Record, frozen=True, kw_only=True):
    """The tokenizer that made the ids."""

    sha256: Annotated[str, Meta(description="of its definition, without padding and truncation")]


class RecordedPrompt(Record, frozen=True, kw_only=True):
    """One prompt: its ids, and of which of its tokens there are states."""

    index: Annotated[int, Meta(ge=0)]
    text: Annotated[str | None, Meta(description="as the user gave it; null where only ids are known")] = None
    rendered: Annotated[str | None, Meta(description="what a chat template made of it")] = None
    group: str | None = None
    ids: Annotated[list[Annotated[int, Meta(ge=0, le=_MOST)]], Meta(min_length=1)]
    positions: Annotated[
        list[Annotated[int, Meta(ge=0)]] | None,
        Meta(description="the tokens of which there are states, ascending; null for all"),
    ] = None
    response: Annotated[
        list[tuple[int, int]] | None,
        Meta(
            description="tokens of the responses, and the one before each: from, and up to but not including"
        ),
    ] = None

    @property
    def kept(self) -> list[int] | range:
        """Return the tokens of which there are states."""
        return range(len(self.ids)) if self.positions is None else self.positions


class Shard(Record, frozen=True, kw_only=True):
    """One file of tensors, and the prompts that are in it."""

    file: str
    prompts: list[Annotated[int, Meta(ge=0)]]
    n_bytes: Annotated[int | None, Meta(description="its size; null where that is not checked")] = None


class Contents(Record, frozen=True, kw_only=True):
    """All of recording.json."""

    format: Literal["lazarus-recording"] = "lazarus-recording"
    version: Literal[1] = 1
    model: RecordedModel
    runtime: Runtime
    tokenizer: RecordedTokenizer | None = None
    positions: Annotated[
        Literal["all", "compared"],
        Meta(description="whether there are states of every token of every prompt"),
    ]
    sites: Annotated[
        list[str],
        Meta(description="embedding, resid_post.N, final_norm, logits, ...: the tensors of each prompt"),
    ]
    prompts: Annotated[list[RecordedPrompt], Meta(min_length=1)]
    shards: list[Shard]
    notes: list[str] = []  # noqa: RUF012 - msgspec copies it
    checksum: Annotated[
        str | None,
        Meta(description="SHA-256 of this object as compact JSON without this field; null if not checked"),
    ] = None


class _Head(msgspec.Struct):
    format: str = ""
    version: int = 0


def write(contents: Contents, stream: IO[bytes]) -> None:
    """Write recording.json, with its checksum, one prompt a line."""
    write_json(msgspec.structs.replace(contents, checksum=_checksum(contents)), stream)


def decode(path: Path) -> Contents:
    """Read recording.json, and check that it does not contradict itself.

    Raises:
        RecordingError: it is no recording, of a later version, or damaged.
    """
    text = read_bytes(path, RecordingError, f"Name a folder that holds {MANIFEST}.", None)
    try:
        head = msgspec.json.decode(text, type=_Head)
        if head.format == FORMAT and head.version > FORMAT_VERSION:
            raise RecordingError(
                f"{path}: format version {head.version}, and this version of lazarus reads up to "
                f"{FORMAT_VERSION}. Update lazarus."
            )
        found = msgspec.json.decode(text, type=Contents)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordingError(
            f"{path}: no recording, or a damaged one: {error}. Record again, or copy it again."
        ) from error
    why = _contradiction(found)
    if why is not None:
        raise RecordingError(f"{path}: {why}. Record again, or copy it again.")
    return found


def recording_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of recording.json."""
    (reference,), parts = msgspec.json.schema_components([Contents], ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lazarus recording",
        **reference,
        "$defs": parts,
    }


def _checksum(contents: Contents) -> str:
    plain = msgspec.to_builtins(contents)
    del plain["checksum"]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _contradiction(found: Contents) -> str | None:
    if found.checksum is not None and found.checksum != _checksum(found):
        return "it was changed after it was written: its checksum is of another text"
    unknown = [site for site in found.sites if not KNOWN_SITE.fullmatch(site)]
    if unknown or len(set(found.sites)) < len(found.sites):
        return f"its sites are not known, or twice: {', '.join(unknown or found.sites)[:200]}"
    if [prompt.index for prompt in found.prompts] != list(range(len(found.prompts))):
        return "its prompts are not numbered from 0 in their order"
    held = sorted(index for shard in found.shards for index in shard.prompts)
    if held != list(range(len(found.prompts))):
        return f"its files hold {len(held)} prompts, and it lists {len(found.prompts)}, or not the same ones"
    why = contradiction_of_sites(found.sites, found.model.n_layers)
    if why is not None:
        return why
    bad = [shard.file for shard in found.shards if not _FILE.fullmatch(shard.file)]
    if bad:
        return f"a file that is not in its folder: {bad[0]!r}"
    return next((why for prompt in found.prompts if (why := bad_prompt(prompt, found.positions))), None)


def contradiction_of_sites(sites: Sequence[str], n_layers: int) -> str | None:
    """Return why these cannot be the sites of a model of so many blocks, as a clause; None where they can."""
    beyond = [site for site in sites if int(site.partition(".")[2] or 0) >= n_layers]
    if beyond:
        return f"it has {beyond[0]}, and its model {n_layers} blocks, counted from 0"
    if len({TOP_IDS, TOP_LOGPROBS} & set(sites)) == 1:
        return f"it has one of {TOP_IDS} and {TOP_LOGPROBS}, which belong together"
    return None


def bad_prompt(prompt: RecordedPrompt, positions: str = "compared") -> str | None:
    """Return what a prompt says that cannot be, as a clause; None where it is sound."""
    kept, n_tokens = prompt.positions, len(prompt.ids)
    if any(not 0 <= start < stop <= n_tokens for start, stop in prompt.response or ()):
        return f"prompt {prompt.index}: its response is not among its {n_tokens} tokens"
    if kept is None:
        return None
    if kept != sorted(set(kept)) or not kept or kept[-1] >= n_tokens:
        return f"prompt {prompt.index}: its positions are not ascending tokens of its {n_tokens}"
    if positions == "all" and len(kept) < n_tokens:
        return f"prompt {prompt.index}: states of {len(kept)} of {n_tokens} tokens, and it says all"
    return None
