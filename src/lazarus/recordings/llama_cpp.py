"""Record a GGUF file as llama.cpp runs it: its tensors are read in llama.cpp's evaluation callback.

llama-cpp-python is imported when it is used, and no torch is.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import (
    DeviceError,
    ModelNotFoundError,
    PromptTooLongError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from lazarus.foreign import user_path
from lazarus.recordings.format import RecordedPrompt
from lazarus.recordings.ggml import PACKAGE, Rows, Taps, imported, quiet
from lazarus.recordings.recording import Recording
from lazarus.recordings.sites import LOGITS, TOP_IDS, TOP_LOGPROBS

RUNTIME = "llama.cpp"
MOST_PROMPTS_NAMED = 3

CacheType = Literal["float16", "float32"]
_GGML_TYPES: dict[str, int] = {"float32": 0, "float16": 1}


@dataclass(frozen=True)
class LlamaCppOptions:
    """Settings with which llama.cpp runs a file; the defaults are its own."""

    cache_dtype: CacheType = "float16"
    """the type of cached keys and values"""
    flash_attention: bool | None = None
    """None leaves it to llama.cpp, which uses it where it can"""
    n_batch: int = 512
    """tokens at once; longer prompts go in pieces, over the KV cache"""
    n_threads: int | None = None
    """None for all cores"""
    n_gpu_layers: int = 0
    """blocks on the GPU, if llama-cpp-python was built for one; -1 for all"""
    repacked: bool = True
    """let llama.cpp rearrange weights for the CPU's matrix units, as it does by itself"""
    logits: bool = False
    """also record the logits of every token"""
    top_k: int = 0
    """of these, how many of the likeliest tokens are kept at each place; 0 for all"""
    model_name: str | None = None
    """what the model is called; None for the path of the file"""
    tokenizer_sha256: str | None = None
    """of the tokenizer that made the ids"""
    notes: tuple[str, ...] = ()
    """what a reader must know besides"""


def record_gguf(
    path: str | Path,
    prompts: Sequence[str | RecordedPrompt],
    folder: str | Path,
    options: LlamaCppOptions | None = None,
    advanced: Callable[[int], None] = lambda _: None,
) -> Recording:
    """Run prompts through a GGUF file in llama.cpp, and record every block's output.

    A prompt's ids are those that the other model reads, so they are given, in a `RecordedPrompt`. If its text
    is given too, and llama.cpp's own tokenizer reads that otherwise, the recording's notes say so. A prompt
    that is a text is read by llama.cpp's tokenizer.

    Args:
        path: the file; of a split one, its first part.
        prompts: texts, or ids.
        folder: where the recording goes; it must be empty.
        options: how llama.cpp runs.
        advanced: is told how many more tokens have run.

    Raises:
        MissingPackageError: llama-cpp-python is not installed.
        ModelError: the file is not there, llama.cpp cannot load it, or it names no block's output.
        PromptDataError: a prompt is longer than the context.
        UsageError: the folder holds something, or an id is not in the vocabulary.
    """
    options = options or LlamaCppOptions()
    with Model(user_path(path), options) as model:
        read = [model.read(index, prompt) for index, prompt in enumerate(prompts)]
        writer = Recording.create(folder, **model.about(), notes=[*options.notes, *model.notes(read)])
        with writer, Context(model, max((len(prompt.ids) for prompt in read), default=1)) as context:
            for prompt in read:
                states = context.run(prompt.ids)
                kept = {site: rows[prompt.kept] for site, rows in states.items()}
                if options.top_k and LOGITS in kept:
                    kept |= likeliest(kept.pop(LOGITS), options.top_k)
                writer.add(
                    prompt.ids,
                    kept,
                    text=prompt.text,
                    positions=prompt.positions,
                    group=prompt.group,
                    rendered=prompt.rendered,
                )
                advanced(len(prompt.ids))
    return Recording.open(folder)


def likeliest(logits: Rows, k: int) -> dict[str, NDArray[Any]]:
    """Return the likeliest tokens of each row, and their log-probabilities; last, that of all others."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    logprobs = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids, others = order[:, :k], order[:, k:]
    with np.errstate(divide="ignore"):  # where no other token is left
        rest = np.log(np.exp(np.take_along_axis(logprobs, others, axis=1)).sum(axis=1, keepdims=True))
    best = np.take_along_axis(logprobs, ids, axis=1)
    return {TOP_IDS: ids.astype(np.int32), TOP_LOGPROBS: np.concatenate([best, rest], axis=1)}


class Model:
    """A GGUF file that llama.cpp has loaded."""

    def __init__(self, path: Path, options: LlamaCppOptions) -> None:
        self.library = imported()
        self.path, self.options = path, options
        if not path.is_file():
            raise ModelNotFoundError(f"{path}: no such file. Name a GGUF file.")
        with quiet():
            self.library.llama_backend_init()
            settings = self.library.llama_model_default_params()
            settings.n_gpu_layers = options.n_gpu_layers
            settings.use_extra_bufts = options.repacked
            self.handle = self.library.llama_model_load_from_file(os.fsencode(path), settings)
        if not self.handle:
            raise WeightsError(
                f"{path}: llama.cpp cannot load it; what it said is above. Is the file whole, and of an "
                f"architecture that {PACKAGE} {self.library.__version__} knows?"
            )
        self.n_layers: int = self.library.llama_model_n_layer(self.handle)
        self.hidden_size: int = self.library.llama_model_n_embd(self.handle)
        self.n_context: int = self.library.llama_model_n_ctx_train(self.handle)
        self.vocabulary = self.library.llama_model_get_vocab(self.handle)
        self.vocabulary_size: int = self.library.llama_vocab_n_tokens(self.vocabulary)
        self.architecture = self.metadata("general.architecture") or "unknown"
        if self.library.llama_model_has_encoder(self.handle):
            self.close()
            raise UnsupportedModelError(f"{path}: {self.architecture} has an encoder; decoders are recorded.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free its memory."""
        with quiet():
            self.library.llama_model_free(self.handle)

    def metadata(self, key: str) -> str | None:
        """Return a value of the file's metadata as text; None where there is none."""
        buffer = ctypes.create_string_buffer(1024)
        length = self.library.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else None

    def about(self) -> dict[str, Any]:
        """Return what a recording says of the model and of the runtime."""
        buffer = ctypes.create_string_buffer(256)
        self.library.llama_model_desc(self.handle, buffer, len(buffer))
        description = buffer.value.decode(errors="replace")
        flash = self.options.flash_attention
        by_mean = self.metadata(f"{self.architecture}.attention.layer_norm_epsilon") is not None
        return {
            "model": self.options.model_name or str(self.path),
            "n_layers": self.n_layers,
            "hidden_size": self.hidden_size,
            "architecture": self.architecture,
            # "llama 135M F16": the name and the size have no blanks, and a type may be a guess.
            "stored_dtype": description.split(" ", 2)[-1].removeprefix("(guessed) "),
            "run_dtype": "float32",
            "causal": self.metadata(f"{self.architecture}.attention.causal") != "false",
            "layer_norm": by_mean,
            "runtime": RUNTIME,
            "runtime_version": f"{PACKAGE} {self.library.__version__}",
            "device": "gpu" if self.options.n_gpu_layers else "cpu",
            "details": {
                "kv_cache": self.options.cache_dtype,
                "flash_attention": "auto" if flash is None else "on" if flash else "off",
                "n_batch": str(self.options.n_batch),
                "system": self.library.llama_print_system_info().decode(errors="replace").strip(),
            },
            "tokenizer_sha256": self.options.tokenizer_sha256,
        }

    def read(self, index: int, prompt: str | RecordedPrompt) -> RecordedPrompt:
        """Return a prompt with its ids.

        Raises:
            PromptTooLongError: it is longer than the context.
            UsageError: an id is not in the vocabulary.
        """
        if isinstance(prompt, str):
            prompt = RecordedPrompt(index=index, text=prompt, ids=self.tokens(prompt))
        if not prompt.ids:
            raise UsageError(f"prompt {index}: llama.cpp's tokenizer gives it no token. Leave it out.")
        if len(prompt.ids) > self.n_context:
            raise PromptTooLongError(
                f"prompt {index}: {len(prompt.ids)} tokens, and the context of {self.path} has "
                f"{self.n_context}. Shorten it, or leave it out."
            )
        if max(prompt.ids) >= self.vocabulary_size:
            raise UsageError(
                f"prompt {index}: the id {max(prompt.ids)}, and the vocabulary of {self.path} has "
                f"{self.vocabulary_size} tokens. Do the ids come from this model's tokenizer?"
            )
        return prompt

    def tokens(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the ids that llama.cpp's own tokenizer gives."""
        encoded = text.encode()
        room = len(encoded) + 8
        ids = (self.library.llama_token * room)()
        given = (self.vocabulary, encoded, len(encoded), ids, room, add_special, True)
        return list(ids[: self.library.llama_tokenize(*given)])

    def notes(self, prompts: Sequence[RecordedPrompt]) -> list[str]:
        """Return how llama.cpp's own tokenizer reads the prompts whose text is known, if otherwise."""
        otherwise = []
        for prompt in prompts:
            text = prompt.rendered or prompt.text
            if text is None:
                continue
            # What a chat template gives has its special tokens already.
            own = self.tokens(text, add_special=prompt.rendered is None)
            if own != prompt.ids:
                otherwise.append((prompt.index, _first_difference(prompt.ids, own)))
        if not otherwise:
            return []
        named = "; ".join(f"prompt {index}: {where}" for index, where in otherwise[:MOST_PROMPTS_NAMED])
        return [
            f"llama.cpp's own tokenizer reads {len(otherwise)} of {len(prompts)} prompts otherwise "
            f"({named}). The ids that were given were run."
        ]


def _first_difference(given: Sequence[int], own: Sequence[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(given, own, strict=False)) if a != b), None)
    if place is None:
        return f"{len(given)} tokens given, {len(own)} by llama.cpp"
    return f"token {place} is {given[place]}, and {own[place]} by llama.cpp"


class Context:
    """A model with its KV cache, whose tensors are read while it runs."""

    def __init__(self, model: Model, n_tokens: int) -> None:
        self.model, library, options = model, model.library, model.options
        self.taps = Taps(library, model.n_layers, logits=options.logits)
        settings = library.llama_context_default_params()
        settings.n_ctx = n_tokens
        settings.n_batch = settings.n_ubatch = min(n_tokens, options.n_batch)
        settings.n_threads = settings.n_threads_batch = options.n_threads or os.cpu_count() or 1
        settings.type_k = settings.type_v = _GGML_TYPES[options.cache_dtype]
        if options.flash_attention is not None:
            settings.flash_attn_type = int(options.flash_attention)
        settings.no_perf = True
        settings.cb_eval = self.taps.callback
        self.n_batch = int(settings.n_batch)
        with quiet():
            self.handle = library.llama_init_from_model(model.handle, settings)
        if not self.handle:
            raise DeviceError(f"{model.path}: llama.cpp cannot make a context of {n_tokens} tokens.")
        self.batch = library.llama_batch_init(self.n_batch, 0, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.model.library.llama_batch_free(self.batch)
        with quiet():
            self.model.library.llama_free(self.handle)

    def run(self, ids: Sequence[int]) -> dict[str, Rows]:
        """Run one prompt alone; return [tokens, width] of every site.

        Raises:
            DeviceError: llama.cpp stopped.
            UnsupportedModelError: it gave no such tensor of the model.
        """
        library = self.model.library
        library.llama_memory_clear(library.llama_get_memory(self.handle), True)
        pieces = []
        for start in range(0, len(ids), self.n_batch):
            piece = ids[start : start + self.n_batch]
            self._fill(piece, start)
            self.taps.begin(len(piece))
            code = library.llama_decode(self.handle, self.batch)
            if code:
                raise DeviceError(
                    f"{self.model.path}: llama.cpp stopped with code {code} at token {start} of {len(ids)}."
                )
            pieces.append(self.taps.found(self.model.path, self.model.architecture))
        return {site: np.concatenate([piece[site] for piece in pieces]) for site in pieces[0]}

    def _fill(self, ids: Sequence[int], start: int) -> None:
        self.batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            self.batch.token[i] = token
            self.batch.pos[i] = start + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            # The last block and all that follows run only the tokens whose logits are asked for.
            self.batch.logits[i] = True
