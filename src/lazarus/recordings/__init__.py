"""Recordings: hidden states on disk, which take the place of a live model. NumPy alone; no torch here.

format.py      recording.json: its records, its JSON Schema, what is refused of it
tensors.py     the tensors of a safetensors file, written in any order and read one at a time
folder.py      the folder that holds both
recording.py   `Recording`: write one prompt by prompt, or open one and read its rows
sites.py       what the sites of a recording are called
llama_cpp.py   GGUF files run by llama.cpp, by the package llama-cpp-python (ggml.py reads its tensors)
vllm.py        the files of vLLM's hidden states connector
arrays.py      npy, npz and safetensors files of other programs
"""

from lazarus.recordings.arrays import from_arrays
from lazarus.recordings.folder import Claim, make_folder, remove_written, write_manifest
from lazarus.recordings.format import (
    FORMAT_VERSION,
    MANIFEST,
    Contents,
    RecordedModel,
    RecordedPrompt,
    RecordedTokenizer,
    Runtime,
    Shard,
    recording_schema,
)
from lazarus.recordings.llama_cpp import LlamaCppOptions, record_gguf
from lazarus.recordings.recording import (
    Recording,
    RecordingWriter,
    check_brought,
    is_recording,
)
from lazarus.recordings.sites import EMBEDDING, FINAL_NORM, LOGITS, TOP_IDS, TOP_LOGPROBS, ordered, site_name
from lazarus.recordings.tensors import Array, BFloat16Bits, TensorReader, TensorWriter
from lazarus.recordings.vllm import from_vllm

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "FORMAT_VERSION",
    "LOGITS",
    "MANIFEST",
    "TOP_IDS",
    "TOP_LOGPROBS",
    "Array",
    "BFloat16Bits",
    "Claim",
    "Contents",
    "LlamaCppOptions",
    "RecordedModel",
    "RecordedPrompt",
    "RecordedTokenizer",
    "Recording",
    "RecordingWriter",
    "Runtime",
    "Shard",
    "TensorReader",
    "TensorWriter",
    "check_brought",
    "from_arrays",
    "from_vllm",
    "is_recording",
    "make_folder",
    "ordered",
    "record_gguf",
    "recording_schema",
    "remove_written",
    "site_name",
    "write_manifest",
]
