"""The same command gives the same bytes, but for the time: whatever the hashes and the order of files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lazarus
from lazarus.demo import BASE, FINETUNED

SCRIPT = """
import os, sys
listed, scanned = os.listdir, os.scandir
if os.environ["ORDER"] == "reversed":
    os.listdir = lambda *a: sorted(listed(*a), reverse=True)
else:
    os.listdir = lambda *a: sorted(listed(*a))
import torch
torch.set_num_threads(1)
import lazarus
base, finetuned, folder = sys.argv[1:]
texts = [{"prompt": f"{i} + {i % 7} =", "group": f"g{i % 3}"} for i in range(8)] + ["The sky is"]
pair = lazarus.activation_diff(
    base, finetuned, texts, localize=True, readout="auto", sites="all", position="all", attribute="tensors"
)
results = {
    "activation-diff": pair,
    "streamed": lazarus.activation_diff(base, finetuned, texts, memory="stream"),
    "weight-diff": lazarus.weight_diff(base, finetuned),
    "compare": lazarus.compare(base, finetuned, "3 + 4 ="),
    "series": lazarus.series(base, [base, finetuned], texts),
}
for name, result in results.items():
    for suffix in ("json", "html", "csv", "md"):
        if not (name == "compare" and suffix == "csv"):
            result.save(f"{folder}/{name}.{suffix}")
lazarus.record(base, texts, f"{folder}/recording", logits=True)
"""


def without_time(found: Any) -> Any:
    found.pop("created", None)
    return found


def made(models: Path, folder: Path, seed: str, order: str = "sorted") -> Path:
    """Run every command in a process of its own; returns the folder of its results."""
    folder.mkdir()
    environment = os.environ | {"PYTHONHASHSEED": seed, "ORDER": order}
    arguments = [models / "base", models / "finetuned", folder]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(BASE, folder / "base")
    shutil.copytree(FINETUNED, folder / "finetuned")
    return folder


def test_neither_hashes_nor_the_order_of_files_change_a_byte(models: Path, tmp_path: Path) -> None:
    one = made(models, tmp_path / "one", "0")
    other = made(models, tmp_path / "other", "random", "reversed")
    for path in sorted(path for path in one.rglob("*") if path.is_file()):
        twin = other / path.relative_to(one)
        if path.suffix == ".json":
            found, expected = (without_time(json.loads(each.read_bytes())) for each in (twin, path))
            assert json.dumps(found) == json.dumps(expected), path.name  # the order of keys too
        elif path.suffix == ".html":
            stamps = [
                json.loads(each.joinpath(f"{path.stem}.json").read_bytes())["created"]
                for each in (one, other)
            ]
            texts = [each.read_text(encoding="utf-8") for each in (path, twin)]
            assert texts[0].replace(stamps[0], "") == texts[1].replace(stamps[1], ""), path.name
        else:
            digests = {hashlib.sha256(each.read_bytes()).hexdigest() for each in (path, twin)}
            assert len(digests) == 1, path.name


def test_another_number_of_threads_is_within_the_noise(tmp_path: Path) -> None:
    texts = [f"{i} + {i % 7} =" for i in range(12)]
    torch.set_num_threads(2)
    lazarus.record(BASE, texts, tmp_path / "two", logits=True)
    torch.set_num_threads(1)
    found = lazarus.activation_diff(BASE, tmp_path / "two", localize=True)
    assert found.summary.verdict in ("identical", "within_noise")
    assert found.record.environment.n_threads == 1
