"""Recordings: hidden states on disk, which take the place of a live model. NumPy alone; no torch here.

format.py      recording.json: its records, its JSON Schema, what is refused of it
tensors.py     the tensors of a safetensors file, written in any order and read one at a time
recording.py   `Recording`: write one prompt by prompt, or open one and read its rows
sites.py       what the sites of a recording are called
"""

from lazarus.recordings.format import (
    FORMAT_VERSION,
    MANIFEST,
    Contents,
    RecordedModel,
    RecordedPrompt,
    Runtime,
    recording_schema,
)
from lazarus.recordings.recording import Recording, RecordingWriter, is_recording
from lazarus.recordings.sites import site_name
from lazarus.recordings.tensors import BFloat16Bits

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "BFloat16Bits",
    "Contents",
    "RecordedModel",
    "RecordedPrompt",
    "Recording",
    "RecordingWriter",
    "Runtime",
    "is_recording",
    "recording_schema",
    "site_name",
]
