"""The pair that ships: real, small, and instructive."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lazarus
from lazarus.demo import BASE, FINETUNED, PROMPTS
from lazarus.results import json_schema


@pytest.fixture(scope="module")
def diff() -> lazarus.ActivationDiff:
    return lazarus.activation_diff(BASE, FINETUNED, f"@{PROMPTS}")


def test_arithmetic_diverges_more_than_prose_at_every_layer(diff: lazarus.ActivationDiff) -> None:
    divergence = diff.results.column("divergence")
    groups = np.array([prompt.group for prompt in diff.prompts])
    arithmetic, prose = (divergence[groups == name].mean(axis=0) for name in ("arithmetic", "prose"))
    assert (arithmetic > prose).all()


def test_its_result_follows_the_published_schema(diff: lazarus.ActivationDiff, tmp_path: Path) -> None:
    diff.save(tmp_path / "demo.json")
    document = json.loads((tmp_path / "demo.json").read_bytes())
    jsonschema.Draft202012Validator(json_schema()).validate(document)


def test_the_weights_are_small_bfloat16_safetensors() -> None:
    for folder in (BASE, FINETUNED):
        assert (folder / "model.safetensors").stat().st_size <= 2_000_000
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_the_models_are_trained(diff: lazarus.ActivationDiff) -> None:
    """Each is better than a uniform guess, and the fine-tune is better at sums than its base."""
    text = "12 + 7 = 19"
    losses = [_loss(folder, text) for folder in (BASE, FINETUNED)]
    assert losses[1] < losses[0] - 1
    prose = "If the file does not exist, an exception is raised."
    assert _loss(BASE, prose) < np.log(1000) - 1


def _loss(folder: Path, text: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_the_tokenizer_puts_one_bos_in_front_and_loses_nothing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("Return 12 + 7, naïve.")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Return 12 + 7, naïve."
