"""Adapters that do not fit, are damaged, or are put on nothing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from bad_input.kind import BadInput, change_json, compare, typed
from factories import tiny_llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def lora(folder: Path, model: PreTrainedModel | None = None, **settings: Any) -> Path:
    """A LoRA adapter for the model, saved as `adapter` with `base` as the model that it names."""
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    wrapped = get_peft_model(model or tiny_llama(), config)
    wrapped.save_pretrained(str(folder / "adapter"))
    change_json(folder / "adapter" / CONFIG, base_model_name_or_path="base")
    return folder / "adapter"


def _for_a_wider_model(folder: Path) -> list[str]:
    lora(folder, tiny_llama(hidden_size=48))
    return compare(f="adapter")


def _for_other_modules(folder: Path) -> list[str]:
    change_json(lora(folder) / CONFIG, target_modules=["c_attn"])
    return compare(f="adapter")


def _for_more_layers(folder: Path) -> list[str]:
    lora(folder, tiny_llama(num_hidden_layers=6))
    return compare(f="adapter")


def _prompt_tuning(folder: Path) -> list[str]:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny_llama(), settings).save_pretrained(str(folder / "adapter"))
    return compare(f="adapter")


def _pickled(folder: Path) -> list[str]:
    adapter = lora(folder)
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    return compare(f="adapter")


def _cut_short(folder: Path) -> list[str]:
    weights = lora(folder) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    return compare(f="adapter")


def _config_broken(folder: Path) -> list[str]:
    (lora(folder) / CONFIG).write_text('{"peft_type": "LO', encoding="utf-8")
    return compare(f="adapter")


def _of_an_unknown_type(folder: Path) -> list[str]:
    change_json(lora(folder) / CONFIG, peft_type="LORA9")
    return compare(f="adapter")


def _on_an_adapter(folder: Path) -> list[str]:
    lora(folder)
    return compare(f="adapter+adapter")


def _on_both_sides(folder: Path) -> list[str]:
    lora(folder)
    return compare(b="adapter", f="adapter")


def _without_its_base(folder: Path) -> list[str]:
    change_json(lora(folder) / CONFIG, base_model_name_or_path=None)
    return compare(b="adapter")


def _whose_base_is_gone(folder: Path) -> list[str]:
    change_json(lora(folder) / CONFIG, base_model_name_or_path="/models/gone")
    return compare(b="adapter")


def _beside_its_model(folder: Path) -> list[str]:
    lora(folder)
    shutil.copytree(folder / "base", folder / "adapter", dirs_exist_ok=True)
    return compare(f="adapter")


def _good(folder: Path) -> list[str]:
    lora(folder)
    return compare(f="adapter")


KINDS = (
    BadInput(
        "adapter of another width",
        "an adapter for a model of another width",
        _for_a_wider_model,
        ("adapter does not fit LlamaForCausalLM", "q_proj", "[2, 48]", "[2, 32]", "Put it on the model"),
    ),
    BadInput(
        "adapter without its targets",
        "an adapter for modules that the model does not have",
        _for_other_modules,
        ("adapter does not fit LlamaForCausalLM", "c_attn", "Put it on the model"),
    ),
    BadInput(
        "adapter of another depth",
        "an adapter for a model with more layers",
        _for_more_layers,
        ("adapter does not fit LlamaForCausalLM", "4 of its tensors", "layers.4", "Put it on the model"),
    ),
    BadInput(
        "adapter of virtual tokens",
        "a prompt-tuning adapter",
        _prompt_tuning,
        ("adapter", "PROMPT_TUNING", "virtual tokens", "LoRA"),
    ),
    BadInput(
        "adapter pickled",
        "an adapter with pickled weights alone (`adapter_model.bin`)",
        _pickled,
        ("adapter", "adapter_model.safetensors", "Pickled", "safetensors"),
    ),
    BadInput(
        "adapter cut short",
        "an adapter whose download broke off",
        _cut_short,
        ("adapter", "weights cannot be read", "fetch it again"),
    ),
    BadInput(
        "adapter configuration broken",
        "an `adapter_config.json` that is cut short",
        _config_broken,
        ("adapter/adapter_config.json", "cannot be read", "Fetch the adapter again"),
    ),
    BadInput(
        "adapter of an unknown type",
        "an adapter of a type that PEFT does not know",
        _of_an_unknown_type,
        ("adapter", "adapter_config.json", "'LORA9'", "upgrade peft"),
    ),
    BadInput(
        "adapter on an adapter",
        "`-f adapter+adapter`",
        _on_an_adapter,
        ("adapter+adapter", "is itself an adapter", "MODEL+ADAPTER"),
    ),
    BadInput(
        "adapter on both sides",
        "`-b adapter -f adapter`",
        _on_both_sides,
        ("adapter", "runs on top of BASE", "MODEL+adapter"),
    ),
    BadInput(
        "adapter without its base",
        "`-b adapter`, which does not say which model it belongs to",
        _without_its_base,
        ("adapter", "does not say which model", "MODEL+adapter"),
    ),
    BadInput(
        "adapter whose base is gone",
        "`-b adapter`, whose base is not here",
        _whose_base_is_gone,
        ("adapter", "belongs to", "/models/gone", "MODEL+adapter"),
    ),
    BadInput(
        "adapter beside its model",
        "a folder that holds both a model and an adapter",
        _beside_its_model,
        ("adapter", "both a model", "adapter/model.safetensors", "adapter+adapter"),
    ),
    BadInput(
        "a model as an adapter",
        "`-f base+finetuned`, which is no adapter",
        typed(f="base+finetuned"),
        ("finetuned", "no adapter_config.json", "PEFT adapter"),
    ),
    BadInput(
        "adapter without peft",
        "an adapter without the package peft",
        _good,
        ("adapter", "peft", "pip install 'lazarus-introspect[adapters]'"),
        exit_code=2,
        around=lambda: patch.dict(sys.modules, {"peft": None}),
    ),
)
