"""Two good models that cannot be compared, and runs that end early."""

from __future__ import annotations

import io
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from bad_input.kind import BadInput, Prepare, change_json, compare, damaged, overwrite, typed
from factories import save_model, tiny_llama, tiny_tokenizer


def _other(*more: str, tokenizer_size: int = 300, **changes: Any) -> Prepare:
    """A fine-tuned model `other` of another shape or with another tokenizer."""

    def prepare(folder: Path) -> list[str]:
        save_model(folder / "other", tiny_llama(**changes), tiny_tokenizer(tokenizer_size))
        return [*compare(f="other"), *more]

    return prepare


def _wider(folder: Path) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(f"Hello {i}" for i in range(50)), encoding="utf-8")
    _other(hidden_size=48)(folder)
    return compare("--localize", f="other", p="@prompts.txt")


def _copy(folder: Path) -> list[str]:
    shutil.copytree(folder / "base", folder / "copy")
    return compare("--expect", "changed", f="copy")


def _encoders(folder: Path) -> list[str]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=300, num_attention_heads=4, pad_token_id=2, **sizes)
    save_model(folder / "encoder", BertForMaskedLM(config), tiny_tokenizer())
    return compare("--readout", "auto", b="encoder", f="encoder")


def _without_tokenizers(folder: Path) -> list[str]:
    for name in ("one", "other"):
        shutil.copytree(folder / "base", folder / name)
        _no_tokenizer(folder / name)
    return compare(b="one", f="other")


def _words_alone(folder: Path) -> list[str]:
    words = Tokenizer(WordLevel({"Hello": 3}))
    save_model(folder / "words", tiny_llama(), PreTrainedTokenizerFast(tokenizer_object=words))
    return compare(b="words", f="words", p="Goodbye")


def _no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


class _Interrupted(io.BytesIO):
    """Standard input at which the user gives up waiting."""

    def read(self, _size: int | None = -1) -> bytes:
        signal.raise_signal(signal.SIGINT)
        return b""


TOKENIZERS = (
    BadInput(
        "different tokenizers",
        "two models with different tokenizers",
        _other(tokenizer_size=270),
        ("Prompt 0 ('Hello')", "different ids", "base has", "fine-tuned has", "same tokenizer"),
    ),
    BadInput(
        "no tokenizer",
        "two models without a tokenizer",
        _without_tokenizers,
        ("neither one nor other brings a tokenizer", "beside the weights"),
    ),
    BadInput(
        "a tokenizer too large",
        "a model with the tokenizer of a larger one",
        _other(vocab_size=60),
        ("Prompt 0", "token id", "other has embeddings for 60", "use its own"),
    ),
    BadInput(
        "tokenizer broken",
        "a `tokenizer.json` that is cut short",
        damaged(overwrite("tokenizer.json", '{"version": "1.')),
        ("damaged/tokenizer.json", "no JSON", "line 1, column 13", "fetch it again"),
    ),
    BadInput(
        "tokenizer of an unknown kind",
        "a `tokenizer.json` of a kind that the package tokenizers does not know",
        damaged(lambda model: change_json(model / "tokenizer.json", model={"type": "BPE9"})),
        ("damaged (tokenizer)", "tokenizer.json cannot be read", "newer", "upgrade"),
    ),
    BadInput(
        "tokenizer without the word",
        "a prompt for which the tokenizer has no token",
        _words_alone,
        ("Prompt 0", "the tokenizer fails", "leave the prompt out"),
    ),
    BadInput(
        "tokenizer incomplete",
        "a `tokenizer_config.json` without its `tokenizer.json`",
        damaged(lambda model: (model / "tokenizer.json").unlink()),
        ("damaged (tokenizer)", "no tokenizer.json", "from the base model"),
    ),
)

KINDS = (
    BadInput(
        "different depth",
        "`--localize` for two models with a different number of layers",
        _other("--localize", num_hidden_layers=3),
        ("base and other have 4 blocks of 32", "3 of 32", "Leave --localize out"),
    ),
    BadInput(
        "other blocks",
        "`--localize` for two models of different widths, and 50 prompts",
        _wider,
        ("base and other have 4 blocks of 32", "4 of 48", "Leave --localize out"),
    ),
    BadInput(
        "readout of an encoder",
        "`--readout auto` for two encoders",
        _encoders,
        ("--readout auto", "encoder has no next-token head", "Leave --readout out"),
    ),
    BadInput(
        "different width",
        "two models of different widths",
        _other(hidden_size=48),
        ("base and other have 32 and 48 features", "from 50 prompts on, and these are 1", "give more"),
    ),
    BadInput(
        "a gate not met",
        "`--fail-above 0.000001` and two models that differ by more",
        typed("--fail-above", "0.000001"),
        ("--fail-above 1e-06", "layer", "divergence of"),
        exit_code=3,
        saves=("diff.json",),
    ),
    BadInput(
        "not identical",
        "`--expect identical` and two models that differ",
        typed("--expect", "identical"),
        ("--expect identical: changed", "relative L2", "the noise floor"),
        exit_code=3,
        saves=("diff.json",),
    ),
    BadInput(
        "not changed",
        "`--expect changed` and a fine-tuned model that is a copy of base",
        _copy,
        (
            "--expect changed: IDENTICAL",
            "bit for bit",
            "weights are the same too",
            "one is a copy of the other",
        ),
        exit_code=3,
        saves=("diff.json",),
    ),
    BadInput(
        "interrupted",
        "Ctrl-C",
        typed(p="@-"),
        ("Interrupted",),
        exit_code=130,
        around=lambda: patch("sys.stdin", io.TextIOWrapper(_Interrupted(), encoding="utf-8")),
    ),
)
