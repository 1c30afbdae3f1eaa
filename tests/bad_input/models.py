"""A MODEL that is not there, is no model, or is one that is refused."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import ViTConfig, ViTModel

from bad_input.kind import BadInput, Prepare, change_json, compare, damaged, overwrite, typed
from factories import save_model, tiny_llama, tiny_tokenizer
from layouts import store_codes


def _an_empty_folder(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return compare(f="empty")


def _an_image_model(folder: Path) -> list[str]:
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32)
    save_model(folder / "vision", ViTModel(config), tiny_tokenizer())
    return compare(b="vision", f="vision")


def _weights_alone(folder: Path) -> list[str]:
    (folder / "alone").mkdir()
    shutil.copy(folder / "base" / "model.safetensors", folder / "alone")
    return compare(f="alone/model.safetensors")


def _a_shard(folder: Path) -> list[str]:
    save_model(folder / "sharded", tiny_llama(), max_shard_size="60KB")
    shard = next((folder / "sharded").glob("model-00001-of-*.safetensors"))
    return compare(f=f"sharded/{shard.name}")


def _configured(**changes: Any) -> Prepare:
    """A model whose config.json has these values."""
    return damaged(lambda model: change_json(model / "config.json", **changes))


def _with_broken_modules(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "modules.json").write_text('[{"path": "0_Tra', encoding="utf-8")


def _with_code(model: Path) -> None:
    change_json(
        model / "config.json",
        model_type="own",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    )
    (model / "own.py").write_text("raise SystemExit('this code must not run')\n", encoding="utf-8")


NAMES = (
    BadInput(
        "model path missing",
        "`-f models/org/tuned`, which is not there",
        typed(f="models/org/tuned"),
        ("models/org/tuned", "no such folder or file", "not a Hub id", "Check the path"),
    ),
    BadInput(
        "model name empty",
        "`-f ''`",
        typed(f=""),
        ("''", "no such folder or file", "Check the path"),
    ),
    BadInput(
        "model a relative path",
        "`-f ./tuned`, which is not there",
        typed(f="./tuned"),
        ("./tuned", "no such folder or file", "Check the path"),
    ),
    BadInput(
        "a folder at a revision",
        "`-f finetuned@v9`, and `finetuned` is a folder",
        typed(f="finetuned@v9"),
        ("finetuned@v9", "folders have no revisions", "without @v9"),
    ),
    BadInput(
        "Hub id unknown offline",
        "`-b org/model`, not in the cache and without a network",
        typed(b="org/model"),
        ("org/model", "no such folder", "not in the cache", "HF_HUB_OFFLINE"),
    ),
    BadInput(
        "revision unknown offline",
        "`-b org/model@v9`, not in the cache and without a network",
        typed(b="org/model@v9"),
        ("org/model@v9", "not in the cache", "HF_HUB_OFFLINE"),
    ),
    BadInput(
        "a file that holds no weights",
        "`-f base/tokenizer.json`",
        typed(f="base/tokenizer.json"),
        ("base/tokenizer.json", "neither a .safetensors nor a .gguf", "Name the folder"),
    ),
    BadInput(
        "a file of weights alone",
        "`-f alone/model.safetensors`, beside which there is no config.json",
        _weights_alone,
        ("alone/model.safetensors", "no config.json beside it", "into that folder"),
    ),
    BadInput(
        "a shard of several",
        "`-f` a shard, whose index is beside it",
        _a_shard,
        ("model-00001-of-", "one shard of several", "sharded/model.safetensors.index.json"),
    ),
    BadInput(
        "an empty folder",
        "`-f empty`, an empty folder",
        _an_empty_folder,
        ("empty", "no config.json", "model_type", "save_pretrained"),
    ),
)

CONFIGURATIONS = (
    BadInput(
        "no config.json",
        "a model folder without `config.json`",
        damaged(lambda model: (model / "config.json").unlink()),
        ("damaged", "no config.json", "model_type", "save_pretrained"),
    ),
    BadInput(
        "config.json broken",
        "a `config.json` that is cut short",
        damaged(overwrite("config.json", '{"model_type": "lla')),
        ("damaged/config.json", "no JSON: Unterminated string", "line 1, column 16", "fetch it again"),
    ),
    BadInput(
        "modules.json broken",
        "a sentence-transformers folder whose `modules.json` is cut short",
        damaged(_with_broken_modules),
        ("damaged", "modules.json", "Fetch the model again"),
    ),
    BadInput(
        "no model type",
        "a `config.json` without `model_type`",
        _configured(model_type=None),
        ("damaged", "no config.json there that names a `model_type`", "save_pretrained"),
    ),
    BadInput(
        "unknown model type",
        "a `config.json` with a `model_type` that transformers does not know",
        _configured(model_type="llama9", architectures=["Llama9ForCausalLM"]),
        ("damaged", "`llama9`", "config.json", "newer transformers"),
    ),
    BadInput(
        "a value of the wrong kind",
        "a `config.json` with a text where a number belongs",
        _configured(num_hidden_layers="four"),
        ("damaged", "config.json", "num_hidden_layers", "four", "Mend it"),
    ),
    BadInput(
        "impossible heads",
        "a `config.json` with more heads than the width has room for",
        _configured(num_attention_heads=7),
        ("damaged", "config.json", "attention heads (7)", "Mend it"),
    ),
    BadInput(
        "custom code",
        "a model with Python code of its own (`auto_map`)",
        damaged(_with_code),
        ("damaged", "Python code of its own", "--trust-remote-code"),
    ),
    BadInput(
        "no text model",
        "an image model",
        _an_image_model,
        ("vision", "ViTModel", "token ids alone"),
    ),
    BadInput(
        "quantised without its package",
        "a GPTQ checkpoint with `--dequantize never`, without the package that reads it",
        damaged(partial(store_codes, quant_method="gptq", bits=4), "--dequantize", "never"),
        ("damaged", "GPTQ", "a package is missing", "pip install optimum"),
        around=lambda: patch(
            "transformers.quantizers.quantizer_gptq.is_optimum_available", return_value=False
        ),
    ),
    BadInput(
        "quantised in an unknown way",
        "a checkpoint whose `quant_method` transformers does not know",
        damaged(partial(store_codes, quant_method="int3")),
        ("damaged", "quantised by 'int3'", "cannot read", "unquantised checkpoint"),
    ),
    BadInput(
        "quantised without a word",
        "a quantised checkpoint with the `config.json` of the model that it was made from",
        damaged(store_codes),
        ("damaged", "codes", "lm_head.qweight", "no quantization_config", "Fetch the config.json"),
    ),
)

KINDS = (*NAMES, *CONFIGURATIONS)
