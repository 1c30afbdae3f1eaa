"""What weight-diff is measured against: both files read, and one pass of arithmetic in NumPy float32.

Run as `python -m benchmarks.numpy_pass BASE FINETUNED`. It prints each tensor's relative change, and
that is all it finds.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def main(base: Path, finetuned: Path) -> None:
    """Go through the two checkpoints file by file."""
    for ours in sorted(base.glob("*.safetensors")):
        before, after = _tensors(ours), _tensors(finetuned / ours.name)
        for name, b in before:
            other, f = next(after)
            assert other == name, (other, name)
            difference = f - b
            relative = np.linalg.norm(difference) / np.linalg.norm(b)
            sys.stdout.write(f"{name} {relative:.6f}\n")


def _tensors(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each tensor in the order of the file, as float32."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            yield name, _as_float32(file.read(end - begin), entry["dtype"])


def _as_float32(data: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "F32":
        return np.frombuffer(data, dtype=np.float32)
    assert dtype == "BF16", dtype
    return (np.frombuffer(data, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
