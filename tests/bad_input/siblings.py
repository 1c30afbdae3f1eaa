"""weight-diff and compare: the mistakes of activation-diff that are theirs too, and their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bad_input import adapters, checkpoints, models, outputs, pairs
from bad_input.kind import BadInput, Prepare, damaged
from factories import save_model, tiny_llama, tiny_tokenizer
from layouts import store_codes
from lazarus import record

WEIGHTS = "model.safetensors"
SHARED = (
    *models.NAMES,
    *models.CONFIGURATIONS,
    *checkpoints.KINDS,
    *adapters.KINDS,
    *pairs.TOKENIZERS,
    *outputs.KINDS,
)

OTHERWISE_IN_WEIGHT_DIFF: dict[str, str] = {
    "no text model": "a model of pictures has weights like any other",
    "quantised without its package": "it decodes what is quantised, and has no such option",
    "weights pickled": "they can be allowed, so the message is another",
    "tensor missing": "it is told in the notes",
    "tensor of another shape": "it is told in the notes",
    "weights NaN": "the message speaks of tensors",
    "different tokenizers": "there is no tokenizer in it",
    "no tokenizer": "there is no tokenizer in it",
    "a tokenizer too large": "there is no tokenizer in it",
    "tokenizer broken": "there is no tokenizer in it",
    "tokenizer of an unknown kind": "there is no tokenizer in it",
    "tokenizer without the word": "there is no tokenizer in it",
    "tokenizer incomplete": "there is no tokenizer in it",
    "output over the prompts": "there are no prompts in it",
    "output over the template": "there is no template in it",
}
"""Which of the mistakes with models and outputs come to something else in weight-diff, and why."""

OTHERWISE_IN_COMPARE: dict[str, str] = {
    "weights NaN": "the message speaks of logits",
    "different tokenizers": "each model reads its own way",
}
"""The same of compare."""


def weigh(*more: str, b: str = "base", f: str = "finetuned", o: str = "diff.json") -> list[str]:
    """The arguments of a good weight-diff, with what is wrong put in its place."""
    return ["introspect", "weight-diff", "-b", b, "-f", f, "-o", o, *more]


def lens(
    *more: str, m1: str = "base", m2: str = "finetuned", p: str = "Hello", o: str = "diff.json"
) -> list[str]:
    """The arguments of a good compare, with what is wrong put in its place."""
    return ["introspect", "compare", "-m1", m1, "-m2", m2, "-p", p, "-o", o, *more]


def shared_by(command: str) -> list[BadInput]:
    """The mistakes of activation-diff with which another command must deal just so."""
    others = OTHERWISE_IN_WEIGHT_DIFF if command == "weight-diff" else OTHERWISE_IN_COMPARE
    return [
        replace(kind, title=f"{command}: {kind.title}", prepare=_turned(kind.prepare, command))
        for kind in SHARED
        if kind.title not in others
    ]


def _turned(prepare: Prepare, command: str) -> Prepare:
    """The same mistake on the other command's line."""

    def turned(folder: Path) -> list[str]:
        first, second, *arguments = prepare(folder)
        assert (first, second) == ("introspect", "activation-diff"), (first, second)
        return [first, command, *_without_prompts(arguments, command)]

    return turned


def _without_prompts(arguments: Sequence[str], command: str) -> Iterator[str]:
    rest = iter(arguments)
    for argument in rest:
        if argument == "-p" and command == "weight-diff":
            next(rest)
        else:
            yield argument


def _weights(*more: str, **values: str) -> Prepare:
    return lambda _: weigh(*more, **values)


def _compared(*more: str, **values: str) -> Prepare:
    return lambda _: lens(*more, **values)


def _pickle(payload: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A damage: its weights are in a pickle that holds this."""

    def damage(model: Path) -> None:
        torch.save(payload(load_file(model / WEIGHTS)), model / "pytorch_model.bin")
        (model / WEIGHTS).unlink()

    return damage


def _damaged(damage: Callable[[Path], None], *more: str) -> Prepare:
    """weight-diff on a model after this damage."""
    prepare = damaged(damage)

    def turned(folder: Path) -> list[str]:
        prepare(folder)
        return weigh(*more, f="damaged")

    return turned


def _spoil(*names: str) -> Callable[[Path], None]:
    """A damage: these tensors, or all, are NaN."""

    def damage(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        for name in names or tensors:
            tensors[name].fill_(float("nan"))
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return damage


def _other(**changes: int) -> Prepare:
    """weight-diff against a model of other sizes."""

    def prepare(folder: Path) -> list[str]:
        save_model(folder / "other", tiny_llama(**changes), tiny_tokenizer())
        return weigh("--fail-above", "5", f="other")

    return prepare


def _recorded(prepare: Prepare) -> Prepare:
    """The same where there is a recording of base, of one prompt."""

    def prepared(folder: Path) -> list[str]:
        record(folder / "base", ["Hello"], folder / "recording")
        return prepare(folder)

    return prepared


WEIGHT_DIFF = (
    BadInput(
        "weight-diff: threshold",
        "`--threshold -1`",
        _weights("--threshold", "-1"),
        ("--threshold -1.0", "relative change", "at least 0"),
        exit_code=2,
    ),
    BadInput(
        "weight-diff: limit",
        "`--fail-above nan`",
        _weights("--fail-above", "nan"),
        ("--fail-above nan", "relative change", "at least 0"),
        exit_code=2,
    ),
    BadInput(
        "weight-diff: expectation",
        "`--expect same`",
        _weights("--expect", "same"),
        ("--expect same", "identical or changed"),
        exit_code=2,
    ),
    BadInput(
        "weight-diff: an option of activation-diff",
        "`weight-diff … --position last`",
        _weights("--position", "last"),
        ("No such option", "--position"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "weight-diff: no fine-tuned model",
        "`weight-diff -b base`",
        lambda _: ["introspect", "weight-diff", "-b", "base"],
        ("Missing option", "--finetuned"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "weight-diff: a recording",
        "`-f recording`",
        _recorded(_weights(f="recording")),
        ("recording: a recording", "hidden states and no weights", "Name the model here"),
    ),
    BadInput(
        "weight-diff: pickled weights",
        "`-f damaged`, whose weights are in a `pytorch_model.bin`",
        _damaged(_pickle(dict)),
        ("damaged", "pickled (pytorch_model.bin)", "--allow-pickle", "save_pretrained"),
    ),
    BadInput(
        "weight-diff: a pickle of more than tensors",
        "the same with `--allow-pickle`, and the pickle holds more than tensors",
        _damaged(_pickle(lambda tensors: {**tensors, "path": Path()}), "--allow-pickle"),
        ("pytorch_model.bin", "more than plain tensors", "save_pretrained"),
    ),
    BadInput(
        "weight-diff: damaged codes",
        "`-f damaged`, whose weights are quantised by GPTQ, and whose codes are of another type",
        _damaged(partial(store_codes, quant_method="gptq", bits=4)),
        ("damaged", "lm_head.weight cannot be decoded", "qweight", "I8", "Fetch the checkpoint again"),
    ),
    BadInput(
        "weight-diff: nothing in common",
        "a model of another width, whose every tensor has another shape",
        _other(hidden_size=64, intermediate_size=96),
        ("base and other", "no tensor in common", "one architecture"),
    ),
    BadInput(
        "weight-diff: all NaN",
        "`-f damaged`, whose every number is NaN",
        _damaged(_spoil()),
        ("base and damaged", "NaN or infinity", "again"),
    ),
    BadInput(
        "weight-diff: a gate not met",
        "`--fail-above 0.000001`",
        _weights("--fail-above", "0.000001"),
        ("--fail-above 1e-06", "layer", "relative change of"),
        exit_code=3,
        saves=("diff.json",),
    ),
    BadInput(
        "weight-diff: a gate over NaN",
        "`--fail-above 5`, where one tensor of the fine-tuned model is NaN",
        _damaged(_spoil("model.norm.weight"), "--fail-above", "5"),
        ("--fail-above 5", "final_norm", "no relative change", "notes"),
        exit_code=3,
        saves=("diff.json",),
    ),
    BadInput(
        "weight-diff: a gate over what cannot be compared",
        "`--fail-above 5`, where the other model's MLP has another width",
        _other(intermediate_size=96),
        ("--fail-above 5", "12 tensors have no counterpart", "model.layers.0.mlp", "notes"),
        exit_code=3,
        saves=("diff.json",),
    ),
    BadInput(
        "weight-diff: not identical",
        "`--expect identical`, of two models that differ",
        _weights("--expect", "identical"),
        ("--expect identical: changed", "tensors differ"),
        exit_code=3,
        saves=("diff.json",),
    ),
    BadInput(
        "weight-diff: not changed",
        "`--expect changed`, of a model and itself",
        _weights("--expect", "changed", f="base"),
        ("--expect changed: IDENTICAL", "same files"),
        exit_code=3,
        saves=("diff.json",),
    ),
)

COMPARE = (
    BadInput(
        "compare: no prompt",
        "`compare -m1 base -m2 finetuned`",
        lambda _: ["introspect", "compare", "-m1", "base", "-m2", "finetuned"],
        ("No prompt", "neither model is a recording"),
        exit_code=2,
    ),
    BadInput(
        "compare: two recordings",
        "`-m1 recording -m2 recording`",
        _recorded(lambda _: ["introspect", "compare", "-m1", "recording", "-m2", "recording"]),
        ("are recordings", "LM head of a live model", "Name the model"),
        exit_code=2,
    ),
    BadInput(
        "compare: a prompt that was not recorded",
        "`-m1 base -m2 recording -p 'Hello there'`, and the recording is of another prompt",
        _recorded(_compared(m2="recording", p="Hello there")),
        ("recording does not hold this prompt", "at token", "Record this prompt"),
    ),
    BadInput(
        "compare: the parting of a recording",
        "`-m1 base -m2 recording --at parting`",
        _recorded(_compared("--at", "parting", m2="recording")),
        ("--at parting", "recording is a recording", "--at last"),
        exit_code=2,
    ),
    BadInput(
        "compare: an empty prompt",
        "`-p ''`",
        _compared(p=""),
        ("Prompt 0 is empty", "Give it a text"),
        exit_code=2,
    ),
    BadInput(
        "compare: a file that is not there",
        "`-p @nothing.txt`",
        _compared(p="@nothing.txt"),
        ("nothing.txt", "No such file"),
        exit_code=2,
    ),
    BadInput(
        "compare: no tokens",
        "`--top-k 0`",
        _compared("--top-k", "0"),
        ("--top-k 0", "at least 1"),
        exit_code=2,
    ),
    BadInput(
        "compare: more tokens than there are",
        "`--top-k 1000` of a vocabulary of 300",
        _compared("--top-k", "1000"),
        ("--top-k 1000", "300", "at most 300"),
        exit_code=2,
    ),
    BadInput(
        "compare: nothing tracked",
        "`--track ''`",
        _compared("--track", ""),
        ("--track ''", "no token"),
        exit_code=2,
    ),
    BadInput(
        "compare: no choice of template",
        "`--chat-template no.jinja`, where there is no such file",
        _compared("--chat-template", "no.jinja"),
        ("--chat-template no.jinja", "cannot be read"),
        exit_code=2,
    ),
    BadInput(
        "compare: no type",
        "`--dtype float8`",
        _compared("--dtype", "float8"),
        ("--dtype float8", "float32"),
        exit_code=2,
    ),
    BadInput(
        "compare: a gate",
        "`--fail-above 0.1`",
        _compared("--fail-above", "0.1"),
        ("No such option", "--fail-above"),
        exit_code=2,
        by_typer=True,
    ),
    BadInput(
        "compare: a prompt that is too long",
        "a prompt of more tokens than the models' context",
        _compared(p="Hello " * 80),
        ("64", "--truncate"),
    ),
)
