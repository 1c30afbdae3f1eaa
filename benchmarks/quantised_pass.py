"""What weight-diff of a quantised checkpoint is measured against: both files read and compared in NumPy.

Run as `python -m benchmarks.quantised_pass BASE QUANTISED`: 4-bit codes of compressed-tensors in groups of
columns. It prints each tensor's relative change, and that is all it finds.
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def main(base: Path, quantised: Path) -> None:
    """Go through the quantised weights, and the same ones before."""
    before, after = _headers(base), _headers(quantised)
    for key in before:
        module = key.removesuffix(".weight")
        if f"{module}.weight_packed" not in after:
            continue
        weight = _floats(*before[key])
        packed = _bytes(*after[f"{module}.weight_packed"]).reshape(len(weight), -1)
        scales = _floats(*after[f"{module}.weight_scale"])
        codes = np.empty((len(packed), packed.shape[1], 2), np.float32)
        codes[..., 0], codes[..., 1] = packed & 15, packed >> 4
        codes -= 8
        decoded = (codes.reshape(len(weight), scales.shape[1], -1) * scales[..., None]).reshape(weight.shape)
        relative = np.linalg.norm(decoded - weight) / np.linalg.norm(weight)
        sys.stdout.write(f"{key} {relative:.6f}\n")


Entry = tuple[Path, int, dict[str, list[int]]]


def _headers(folder: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        found |= {key: (path, 8 + length, entry) for key, entry in header.items() if key != "__metadata__"}
    return found


def _bytes(path: Path, start: int, entry: dict[str, list[int]]) -> NDArray[np.uint8]:
    begin, end = entry["data_offsets"]
    return np.fromfile(path, np.uint8, end - begin, offset=start + begin)


def _floats(path: Path, start: int, entry: dict[str, list[int]]) -> NDArray[np.float32]:
    """A tensor of bfloat16 as float32."""
    raw = _bytes(path, start, entry).view(np.uint16)
    return (raw.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
