"""Files that a stranger made to break what reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input.adapters import CONFIG, lora
from bad_input.kind import BadInput, Prepare, change_json, compare, damaged, overwrite, typed

DEEP = "[" * 200_000
CATASTROPHIC = "^(([a-z])+.)+[A-Z]([a-z])+$"


def config(file: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    """A damage: these values stand in one of the model's files."""
    return lambda model: change_json(model / file, **changes)


def adapter(b: str = "base", f: str = "adapter", **changes: Any) -> Prepare:
    """An adapter whose configuration says this."""

    def prepare(folder: Path) -> list[str]:
        change_json(lora(folder) / CONFIG, **changes)
        return compare(b=b, f=f)

    return prepare


def _deep_adapter(folder: Path) -> list[str]:
    (lora(folder) / CONFIG).write_text(DEEP, encoding="utf-8")
    return compare(f="adapter")


def _deep_result(folder: Path) -> list[str]:
    head = '{"schema_version": "1.0", "command": "compare", "tool": {"name": "a", "version": "b"}, "x":'
    (folder / "saved.json").write_text(head + DEEP, encoding="utf-8")
    return ["show", "saved.json"]


def _deep_modules(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "modules.json").write_text(DEEP, encoding="utf-8")


def _pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "saved.json")
    return ["show", "saved.json"]


def _normalizer(**normalizer: Any) -> Callable[[Path], None]:
    return lambda model: change_json(model / "tokenizer.json", normalizer=normalizer)


KINDS = (
    BadInput(
        "brackets in an adapter",
        "an `adapter_config.json` of 200,000 brackets",
        _deep_adapter,
        ("adapter/adapter_config.json", "cannot be read", "brackets", "Fetch the adapter again"),
    ),
    BadInput(
        "brackets in modules.json",
        "a `modules.json` of 200,000 brackets",
        damaged(_deep_modules),
        ("damaged/modules.json", "cannot be read", "brackets", "Fetch the model again"),
    ),
    BadInput(
        "brackets in a result",
        "a saved result with 200,000 brackets",
        _deep_result,
        ("saved.json", "not a result"),
        exit_code=2,
    ),
    BadInput(
        "device as a result",
        "`lazarus show /dev/zero`",
        lambda _: ["show", "/dev/zero"],
        ("/dev/zero", "cannot be read", "a device", "Check the path"),
        exit_code=2,
    ),
    BadInput(
        "pipe as a result",
        "`lazarus show` of a named pipe to which nobody writes",
        _pipe,
        ("saved.json", "cannot be read", "a pipe", "Check the path"),
        exit_code=2,
    ),
    BadInput(
        "device of prompts",
        "`-p @/dev/zero`",
        typed(p="@/dev/zero"),
        ("-p @/dev/zero", "it is a device", "Check the path"),
        exit_code=2,
    ),
    BadInput(
        "home of nobody",
        "`lazarus show ~nobody99/x.json`",
        lambda _: ["show", "~nobody99/x.json"],
        ("~nobody99/x.json", "No such file", "Check the path"),
        exit_code=2,
    ),
    BadInput(
        "base of an adapter in the home of nobody",
        "an adapter whose base is `~nobody99/x`",
        adapter(base_model_name_or_path="~nobody99/x", b="adapter", f="base"),
        ("adapter", "~nobody99/x", "no such folder", "MODEL+adapter"),
    ),
    BadInput(
        "pattern of an adapter that is none",
        "an adapter whose `target_modules` is `(`",
        adapter(target_modules="("),
        ("adapter", "no regular expression", "missing )", "fetch the adapter again"),
    ),
    BadInput(
        "code for an adapter",
        "an adapter with a `megatron_config`",
        adapter(megatron_config={}, megatron_core="evil"),
        ("adapter/adapter_config.json", "megatron_config", "Python code", "Take it out"),
    ),
    BadInput(
        "layers that no tensor is of",
        "a `config.json` with a billion layers",
        damaged(config(num_hidden_layers=10**9)),
        ("damaged/config.json", "num_hidden_layers is 1000000000", "limit is 100000", "LAZARUS_NO_LIMITS=1"),
    ),
    BadInput(
        "layers that few tensors are of",
        "a `config.json` with 2,000 layers, and a tenth as many tensors",
        damaged(config(num_hidden_layers=2000)),
        ("damaged/config.json", "num_hidden_layers is 2000", "limit is 1000", "tensors are stored"),
    ),
    BadInput(
        "labels without number",
        "a `config.json` with a hundred million labels",
        damaged(config(num_labels=10**8)),
        ("damaged/config.json", "num_labels is 100000000", "limit is 1048576", "LAZARUS_NO_LIMITS=1"),
    ),
    BadInput(
        "size that the files do not hold",
        "a `config.json` whose text model has an `intermediate_size` of 10^12",
        damaged(config(text_config={"intermediate_size": 10**12})),
        ("damaged/config.json", "text_config.intermediate_size is 1000000000000", "bytes are stored"),
    ),
    BadInput(
        "experts that no tensor is of",
        "a `config.json` with a million experts",
        damaged(config(num_local_experts=10**6)),
        ("damaged/config.json", "num_local_experts is 1000000", "limit is 8192", "tensors are stored"),
    ),
    BadInput(
        "rank that no tensor has",
        "an adapter with `r` of a million",
        adapter(r=10**6),
        ("adapter", "sets r to 1000000", "more than 1024 rows or columns", "LAZARUS_NO_LIMITS=1"),
    ),
    BadInput(
        "rank of a pattern that no tensor has",
        "an adapter with a million in its `rank_pattern`",
        adapter(rank_pattern={"q_proj": 10**6}),
        ("adapter", "sets rank_pattern['q_proj'] to 1000000", "LAZARUS_NO_LIMITS=1"),
    ),
    BadInput(
        "tokens that no tensor has rows for",
        "an adapter with a hundred thousand `trainable_token_indices`",
        adapter(trainable_token_indices=[0] * 100_000),
        ("adapter", "trainable_token_indices to 100000", "more than 1024 rows or columns"),
    ),
    BadInput(
        "layers without end",
        "an adapter whose `layer_replication` makes 16,000 layers",
        adapter(layer_replication=[[0, 4]] * 4000),
        ("adapter", "layer_replication", "makes 16000 layers", "the limit is 1000", "LAZARUS_NO_LIMITS=1"),
    ),
    BadInput(
        "iterations without end",
        "an adapter whose `init_lora_weights` is `pissa_niter_99999999`",
        adapter(init_lora_weights="pissa_niter_99999999"),
        ("adapter/adapter_config.json", "99999999 iterations of PiSSA", "100", "LAZARUS_NO_LIMITS=1"),
    ),
    BadInput(
        "modules that are no names",
        "an adapter whose `modules_to_save` holds a list",
        adapter(modules_to_save=[["lm_head"]]),
        ("adapter/adapter_config.json", "modules_to_save is no list of names", "Fetch the adapter again"),
    ),
    BadInput(
        "architecture that is no model",
        "a `config.json` whose `architectures` names `Trainer`",
        damaged(config(architectures=["Trainer"])),
        ("damaged", "config.json names the architecture 'Trainer'", "no model class", "fetch config.json"),
    ),
    BadInput(
        "architecture that is a base class",
        "a `config.json` whose `architectures` names `PreTrainedModel`",
        damaged(config(architectures=["PreTrainedModel"])),
        ("damaged", "config.json names the architecture 'PreTrainedModel'", "no model class"),
    ),
    BadInput(
        "tokenizer that is a model",
        "a `tokenizer_config.json` whose `tokenizer_class` is `LlamaForCausalLM`",
        damaged(config("tokenizer_config.json", tokenizer_class="LlamaForCausalLM")),
        ("damaged (tokenizer)", "tokenizer_config.json names no tokenizer", "Fetch the file again"),
    ),
    BadInput(
        "length that is no number",
        "a `tokenizer_config.json` whose `model_max_length` is a text",
        damaged(config("tokenizer_config.json", model_max_length="x")),
        ("damaged (tokenizer)", "model_max_length is no number", "Fetch the file again"),
    ),
    BadInput(
        "normalizer that gives up",
        "a `tokenizer.json` with a regular expression that does not end",
        damaged(
            _normalizer(type="Replace", pattern={"Regex": CATASTROPHIC}, content="x"),
            b="damaged",
            p="a" * 120,
        ),
        ("Prompt 0", "the tokenizer fails", "retry-limit-in-match over", "fetch them again"),
    ),
    BadInput(
        "secret for a tokenizer",
        "a `tokenizer.json` that holds something else",
        damaged(overwrite("tokenizer.json", "hf_AbCdEf")),
        ("damaged/tokenizer.json", "no JSON: Expecting value (line 1, column 1)", "fetch it again"),
    ),
)
