"""record with `runtime="llama.cpp"`: a GGUF file as llama.cpp runs it, on the ids of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lazarus import _transformers
from lazarus.activation.prepare import Given, Observer, read_asked
from lazarus.engine import check_positions
from lazarus.errors import UsageError
from lazarus.loading import Model
from lazarus.messages import option
from lazarus.models import LoadedModel, LoadOptions, Source, dissect, parse_model, tokenizer_digest
from lazarus.models.checkpoint import build_empty
from lazarus.models.faults import translated
from lazarus.models.gguf.parts import read_files
from lazarus.models.opening import open_checkpoint
from lazarus.notes import Notes
from lazarus.options import RecordOptions, parse_position
from lazarus.reading import Reading
from lazarus.recordings import LlamaCppOptions, RecordedPrompt, Recording, record_gguf
from lazarus.recordings.llama_cpp import RUNTIME
from lazarus.results.anonymous import without_paths
from lazarus.sites import Position, tokens_of

_DEFAULTS = RecordOptions()
_OF_TRANSFORMERS = ("sites", "dtype", "batch_tokens", "memory", "dequantize", "layers_path", "work_dir")


def record_in_llama_cpp(
    given: Given, model: Model, chosen: RecordOptions, folder: Path, watcher: Observer
) -> Recording:
    """Run prompts through a GGUF file in llama.cpp, and record the state after each block.

    The prompts are read by the tokenizer that transformers makes of the file, as they are where the model is
    compared with another; where llama.cpp's own reads them otherwise, the recording's notes say so.

    Raises:
        UsageError: the model is no GGUF file, or an option is not one of llama.cpp's.
        LazarusError: as `record`.
    """
    _check_options(chosen)
    source = _gguf_file(model)
    watcher.loading("base", source.name)
    notes = Notes(given.prompts.notes)
    empty = _empty(source, trust_remote_code=chosen.trust_remote_code)
    watcher.testing(given.prompts.prompts)
    reading = read_asked(given, (empty, empty), notes)
    prompts = prompts_to_record(reading, position_to_record(chosen, reading))
    watcher.running(sum(len(prompt.ids) for prompt in prompts))
    told = without_paths if chosen.anonymous else str
    how = LlamaCppOptions(
        n_gpu_layers=0 if given.device.type == "cpu" else -1,
        logits=chosen.logits,
        top_k=chosen.top_k,
        model_name=told(source.name),
        tokenizer_sha256=tokenizer_digest(reading.tokenizers[0]),
        notes=tuple(map(told, notes.texts)),
    )
    path = read_files(source).paths[0]
    return record_gguf(path, prompts, folder, how, watcher.advanced)


def _gguf_file(model: Model) -> Source:
    named = parse_model(str(model)) if isinstance(model, str | Path) else None
    if named is None or named.model is None or named.model.gguf_file is None or named.adapters:
        name = type(model).__name__ if named is None else named.name
        raise UsageError(
            f"{option('runtime', RUNTIME)} runs .gguf files, and {name} is none. Name a .gguf file, without "
            f"an adapter, or leave {option('runtime')} out.",
            option="runtime",
        )
    return named.model


def _empty(source: Source, *, trust_remote_code: bool) -> LoadedModel:
    """Return a GGUF model without its weights: what is asked of it is which prompts it can read."""
    options = LoadOptions(None, torch.device("meta"), trust_remote_code)
    opened = open_checkpoint(source, options)
    with translated(source.name):
        kind = _transformers.registered_class(opened.model_class, opened.config)
        assert kind is not None, "a GGUF file has no code of its own"
        model = build_empty(kind, opened.config, [], torch.float32)
    return LoadedModel(source.name, "gguf", model, dissect(model), source, tokenizer_sources=(source,))


def position_to_record(chosen: RecordOptions, reading: Reading) -> Position:
    """Return which tokens of each prompt are recorded.

    Raises:
        PositionError: a prompt has no such token.
    """
    if chosen.position == "all":
        return "every"
    position = parse_position(chosen.position)
    check_positions(position, [len(prompt.ids) for prompt in reading.base], Notes())
    return position


def prompts_to_record(reading: Reading, position: Position) -> Sequence[RecordedPrompt]:
    """Return what a recording says of each prompt, and of which of its tokens it has states."""
    return [
        RecordedPrompt(
            index=index,
            text=prompt.text,
            rendered=read.rendered,
            group=prompt.group,
            ids=list(read.ids),
            positions=None if position == "every" else list(tokens_of(read, position)),
            response=[(span.start, span.stop) for span in read.response] or None,
        )
        for index, (prompt, read) in enumerate(zip(reading.prompts, reading.base, strict=True))
    ]


def _check_options(chosen: RecordOptions) -> None:
    if chosen.position == "response":
        raise UsageError(
            f"{option('position', 'response')} is not recorded from llama.cpp. Record all tokens.",
            option="position",
        )
    given = [name for name in _OF_TRANSFORMERS if getattr(chosen, name) != getattr(_DEFAULTS, name)]
    if given:
        raise UsageError(
            f"{option(given[0], getattr(chosen, given[0]))} is about how transformers runs a model, and "
            f"llama.cpp runs this one. Leave it out, or {option('runtime')}.",
            option=given[0],
        )
