"""record with `runtime="llama.cpp"`: a GGUF file as llama.cpp runs it, on the ids of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lazarus.activation.prepare import Given, Observer, read_asked
from lazarus.engine import check_positions
from lazarus.errors import UsageError
from lazarus.loading import Model, load_alone
from lazarus.messages import option
from lazarus.models import tokenizer_digest
from lazarus.models.gguf.parts import read_files
from lazarus.notes import Notes
from lazarus.options import RecordOptions, parse_position
from lazarus.reading import Reading
from lazarus.recordings import LlamaCppOptions, RecordedPrompt, Recording, record_gguf
from lazarus.sites import Position, tokens_of

RUNTIME = "llama.cpp"
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
    notes = Notes(given.prompts.notes)
    # Block by block nothing is read before it runs, and no block runs here.
    options = replace(given.options, memory="stream")
    with given.memory_faults():
        loaded = load_alone(model, "base", options, given.device, watcher.loading, Notes())
    if loaded.source is None or loaded.source.gguf_file is None or loaded.adapter is not None:
        raise UsageError(
            f"{option('runtime', RUNTIME)} runs .gguf files, and {loaded.name} is none. Name a .gguf file, "
            f"without an adapter, or leave {option('runtime')} out.",
            option="runtime",
        )
    watcher.testing(given.prompts.prompts)
    reading = read_asked(given, (loaded, loaded), notes)
    prompts = prompts_to_record(reading, _position(chosen, reading))
    watcher.running(sum(len(prompt.ids) for prompt in prompts))
    how = LlamaCppOptions(
        n_gpu_layers=0 if given.device.type == "cpu" else -1,
        logits=chosen.logits,
        model_name=loaded.name,
        tokenizer_sha256=tokenizer_digest(reading.tokenizers[0]),
        notes=tuple(notes.texts),
    )
    path = read_files(loaded.source).paths[0]
    return record_gguf(path, prompts, folder, how, watcher.advanced)


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


def _position(chosen: RecordOptions, reading: Reading) -> Position:
    if chosen.position == "all":
        return "every"
    position = parse_position(chosen.position)
    check_positions(position, [len(prompt.ids) for prompt in reading.base], Notes())
    return position
