"""The readers that `make fuzz` gives changed files to: every parser of ours, and the loaders."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lazarus
from lazarus.demo import BASE, FINETUNED
from lazarus.models.faults import translated
from lazarus.models.gguf.header import read_header
from lazarus.models.reference import parse_model
from lazarus.models.stored import read_headers
from lazarus.prompts import parse_prompts
from lazarus.ranks import Rank
from lazarus.recordings import Recording
from lazarus.shards import WorkFolder

PROMPT = "3 + 4 ="
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Target:
    """One reader, and a file that it reads."""

    seed: str
    """the path of a good file, below the ground"""
    kind: str
    """how it is changed: a name of `mutations.KINDS`"""
    run: Callable[[Path], object]
    """reads the changed file, which lies in a copy of the seed's folder"""
    is_cheap: bool = True
    """whether it takes milliseconds, and not a model's time"""


# --- the ground: good files of every kind -------------------------------------------------------


def make_ground(root: Path) -> None:
    """Write good files of every kind; computes, so it is called in a fork."""
    for name, source in (("base", BASE), ("model", FINETUNED)):
        shutil.copytree(source, root / name)
    settings = root / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_bytes()), "chat_template": TEMPLATE}))
    _write_prompts(root / "prompts")
    _write_results(root / "results")
    _write_adapter(root)
    _write_gguf(root / "gguf")
    _write_index(root)
    _write_encoder(root)
    lazarus.record(BASE, [PROMPT, "Hello"], root / "recording")
    lazarus.activation_diff(BASE, FINETUNED, [PROMPT, "Hello"], work_dir=str(root / "work"))


def _write_prompts(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rows = [{"prompt": PROMPT, "group": "sums"}, {"prompt": "Hello", "group": "words"}]
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}]
    (folder / "p.txt").write_text("3 + 4 =\nHello\n\nWhat is it?\n")
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, [*rows, *chats])))
    (folder / "p.json").write_text(json.dumps(rows))
    (folder / "p.csv").write_text('prompt,group\n"3 + 4 =",sums\n"Hello, you",words\n')
    pq.write_table(pa.table({"prompt": [PROMPT, "Hello"], "group": ["a", "b"]}), folder / "p.parquet")
    (folder / "name.txt").write_text("model+adapter@main:sub/x.gguf")
    (folder / "arguments.txt").write_text("--position last --layers 0-3 --threshold 0.1 --seed 3")


def _write_results(folder: Path) -> None:
    folder.mkdir()
    lazarus.activation_diff(BASE, FINETUNED, [PROMPT, "Hello"], position="all").save(folder / "a.json")
    lazarus.weight_diff(BASE, FINETUNED).save(folder / "w.json")
    lazarus.compare(BASE, FINETUNED, PROMPT).save(folder / "c.json")
    lazarus.series(BASE, [BASE, FINETUNED], [PROMPT, "Hello"]).save(folder / "s.json")


def _write_adapter(root: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    model.save_pretrained(root / "adapter")
    path = root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "base_model_name_or_path": str(BASE)}))


def _write_gguf(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from ggufs import write_gguf

    folder.mkdir()
    write_gguf(folder / "m.gguf", "llama", AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32))


def _write_index(root: Path) -> None:
    from safetensors import safe_open

    shutil.copytree(root / "model", root / "sharded")
    file = root / "sharded" / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors.keys(), "one.safetensors")}
    file.rename(root / "sharded" / "one.safetensors")
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_encoder(root: Path) -> None:
    shutil.copytree(root / "model", root / "encoder")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (root / "encoder" / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (root / "encoder" / "1_Pooling").mkdir()
    (root / "encoder" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


# --- the readers --------------------------------------------------------------------------------


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace").replace("\0", "")


def _headers(path: Path) -> object:
    with translated("model"):
        return read_headers([str(path)])


def _weights(path: Path) -> object:
    return lazarus.weight_diff(BASE, _model(path))


def _states(path: Path) -> object:
    return lazarus.activation_diff(BASE, _model(path), [PROMPT])


def _chat(path: Path) -> object:
    chat: Any = [{"role": "user", "content": "Hi"}]
    return lazarus.activation_diff(BASE, path.parent, [{"messages": chat}], chat_template="finetuned")


def _model(path: Path) -> str:
    named = (
        path if path.suffix == ".gguf" else path.parent.parent if path.parent.name[0] == "1" else path.parent
    )
    return str(named)


def _recording(path: Path) -> object:
    found = Recording.open(path.parent)
    return found, lazarus.activation_diff(BASE, path.parent, no_noise_floor=True)


def _work(path: Path) -> object:
    return lazarus.activation_diff(BASE, FINETUNED, [PROMPT, "Hello"], work_dir=str(path.parent))


def _shard(path: Path) -> object:
    return WorkFolder.open(str(path.parent), Rank()).read(0)


def _show(path: Path) -> object:
    found = lazarus.load_result(path)
    texts = [str(found)]
    for suffix in ("html", "md", "csv", "json"):
        found.save(path.with_name(f"again.{suffix}"))
    return texts


def _prompts(path: Path) -> object:
    return parse_prompts([f"@{path}"]), parse_prompts([f"@{path}"], responses=True)


def _arguments(path: Path) -> object:
    from typer.testing import CliRunner

    from lazarus.cli import app

    words = _text(path).split(" ")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        done = CliRunner().invoke(
            app, ["introspect", "activation-diff", "-b", "no/model", "-f", "no/model", "-p", "x", *words]
        )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return None


TARGETS: Mapping[str, Target] = {
    "model names": Target("prompts/name.txt", "text", lambda path: parse_model(_text(path))),
    "typed prompts": Target("prompts/p.csv", "text", lambda path: parse_prompts([_text(path)])),
    "arguments": Target("prompts/arguments.txt", "text", _arguments),
    "prompts.txt": Target("prompts/p.txt", "text", _prompts),
    "prompts.jsonl": Target("prompts/p.jsonl", "lines", _prompts),
    "prompts.json": Target("prompts/p.json", "json", _prompts),
    "prompts.csv": Target("prompts/p.csv", "text", _prompts),
    "prompts.parquet": Target("prompts/p.parquet", "bytes", _prompts),
    "GGUF header": Target("gguf/m.gguf", "front", lambda path: read_header("x", str(path))),
    "safetensors header": Target("model/model.safetensors", "safetensors", _headers),
    "result of activation-diff": Target("results/a.json", "json", _show),
    "result of weight-diff": Target("results/w.json", "json", _show),
    "result of compare": Target("results/c.json", "json", _show),
    "result of series": Target("results/s.json", "json", _show),
    "shard of a work dir": Target("work/shard-0000.npz", "bytes", _shard),
    "config.json, weight-diff": Target("model/config.json", "json", _weights, is_cheap=False),
    "config.json, activation-diff": Target("model/config.json", "json", _states, is_cheap=False),
    "tokenizer.json": Target("model/tokenizer.json", "json", _states, is_cheap=False),
    "tokenizer_config.json": Target("model/tokenizer_config.json", "json", _chat, is_cheap=False),
    "model.safetensors": Target("model/model.safetensors", "safetensors", _weights, is_cheap=False),
    "index": Target("sharded/model.safetensors.index.json", "json", _states, is_cheap=False),
    "adapter_config.json": Target("adapter/adapter_config.json", "json", _states, is_cheap=False),
    "adapter of weight-diff": Target("adapter/adapter_config.json", "json", _weights, is_cheap=False),
    "adapter_model": Target("adapter/adapter_model.safetensors", "safetensors", _weights, is_cheap=False),
    "GGUF, weight-diff": Target("gguf/m.gguf", "front", _weights, is_cheap=False),
    "GGUF, activation-diff": Target("gguf/m.gguf", "front", _states, is_cheap=False),
    "recording.json": Target("recording/recording.json", "json", _recording, is_cheap=False),
    "tensors of a recording": Target(
        "recording/00000.safetensors", "safetensors", _recording, is_cheap=False
    ),
    "manifest of a work dir": Target("work/manifest.json", "json", _work, is_cheap=False),
    "modules.json": Target("encoder/modules.json", "json", _states, is_cheap=False),
    "pooling": Target("encoder/1_Pooling/config.json", "json", _states, is_cheap=False),
}
"""by what is changed"""


def prepare(target: Target, ground: Path, folder: Path) -> Path:
    """Copy the seed's folder, and return where the changed file goes."""
    inside = Path(target.seed)
    whole = inside.parts[0]
    shutil.rmtree(folder, ignore_errors=True)
    # Big files by links: only the one that is changed is written.
    shutil.copytree(ground / whole, folder / whole, copy_function=_link)
    path = folder / inside
    path.unlink()
    return path


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


assert np  # imported before the forks
