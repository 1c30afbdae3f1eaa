"""The precision of Diff Mining and of the mean difference, on pairs whose training text is known.

Run as `python -m benchmarks.readout [--write-docs]`. It makes the models that are not in the cache.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import lazarus
from benchmarks import places, subjects, weights
from benchmarks.results import Finetuning
from benchmarks.trust_report import fill_in, table
from lazarus.demo import BASE as DEMO_BASE
from lazarus.demo import FINETUNED as DEMO_FINETUNED
from lazarus.demo import train
from lazarus.options import readout_layers

N_PROMPTS, N_TOKENS = 100, 20
LEAST_COUNT, LEAST_RATIO, LEAST_LETTERS = 3, 10, 3
POSITIONS = ("last", "mean", "all")
SHOWN = 8
RESULTS = places.ROOT / "benchmarks" / "results" / "readout.json"
DOCS = places.ROOT / "docs" / "readout.md"
console = Console(stderr=True)


class Precision(Struct, frozen=True):
    """The share of the first tokens that are salient: of one pair at one position."""

    pair: str
    position: str
    n_prompts: int
    n_salient: int
    """salient tokens of the vocabulary"""
    mined: float
    mean_difference: dict[str, dict[int, float]]
    """by the model whose head reads, and by layer"""
    mined_tokens: list[str]
    difference_tokens: list[str]
    """of the last layer, by the fine-tuned model's head"""


class Results(Struct, frozen=True):
    """All that was measured, and how the fine-tunes on sentences were made."""

    precision: list[Precision]
    finetuned: dict[str, Finetuning]


@dataclass(frozen=True)
class Pair:
    """Two models, and the text that the second was fine-tuned on."""

    name: str
    base: Path
    finetuned: Path
    text: Sequence[str]


def pairs() -> list[Pair]:
    """The pairs; those of SmolLM2 are made first."""
    subjects.main()
    tokenizer = AutoTokenizer.from_pretrained(places.BASE)
    _, rows = weights.arithmetic_rows(tokenizer, places.STEPS * weights.BATCH)
    return [
        Pair("demo pair, arithmetic", DEMO_BASE, DEMO_FINETUNED, train.arithmetic_split()[0]),
        Pair("SmolLM2, arithmetic", places.BASE, places.finetuned(), tokenizer.batch_decode(rows)),
        *(
            Pair(f"SmolLM2, {name}", places.BASE, subjects.folder_of(name), subjects.training(name))
            for name in subjects.TEXTS
        ),
    ]


# --- which tokens are right ---------------------------------------------------------------------


def word(text: str) -> str:
    """A token's text without spaces and case."""
    return text.strip().lower()


def words_of(tokenizer: Any, lines: Sequence[str]) -> Counter[str]:
    """How often each token comes in a text."""
    ids = Counter(i for found in tokenizer(list(lines), add_special_tokens=False).input_ids for i in found)
    counts: Counter[str] = Counter()
    for i, count in ids.items():
        counts[word(tokenizer.decode([i]))] += count
    return counts


def salient(text: Counter[str], references: Sequence[Counter[str]]) -> set[str]:
    """The tokens of a text that are far more frequent there than in each of the references."""

    def stands_out(token: str, count: int) -> bool:
        frequency = count / text.total()
        return all(frequency >= LEAST_RATIO * r[token] / r.total() for r in references)

    return {
        token
        for token, count in text.items()
        if count >= LEAST_COUNT and not _is_fragment(token) and stands_out(token, count)
    }


def _is_fragment(token: str) -> bool:
    letters = sum(character.isalpha() for character in token)
    return not token or 0 < letters < LEAST_LETTERS


# --- what is read -------------------------------------------------------------------------------


def measure(pair: Pair) -> Iterator[Precision]:
    """Read a pair at every position, on general prompts without a word of its subject."""
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    general = places.PROMPTS.read_text(encoding="utf-8").splitlines()
    references = [words_of(tokenizer, lines) for lines in (general, train.prose_split()[0])]
    right = salient(words_of(tokenizer, pair.text), references)
    prompts = [text for text in general if right.isdisjoint(words_of(tokenizer, [text]))][:N_PROMPTS]
    n_salient = sum(word(tokenizer.decode([i])) in right for i in range(len(tokenizer)))
    console.print(f"{pair.name}: {n_salient} salient tokens, {len(prompts)} prompts", highlight=False)

    def precision(tokens: Iterable[str]) -> float:
        return sum(word(token) in right for token in tokens) / N_TOKENS

    for position in POSITIONS:
        diff = lazarus.activation_diff(
            pair.base,
            pair.finetuned,
            prompts,
            position=position,
            readout="auto",
            no_noise_floor=True,
            dtype="float32",
            device="cpu",
        )
        assert diff.record.mined is not None
        mined = [token.token for token in diff.record.mined.promoted]
        read = read_differences(pair, diff, tokenizer)
        yield Precision(
            pair=pair.name,
            position=position,
            n_prompts=len(prompts),
            n_salient=n_salient,
            mined=precision(mined),
            mean_difference={
                name: {layer: precision(tokens) for layer, tokens in layers.items()}
                for name, layers in read.items()
            },
            mined_tokens=mined,
            difference_tokens=list(read["finetuned"].values())[-1],
        )


def read_differences(
    pair: Pair, diff: lazarus.ActivationDiff, tokenizer: Any
) -> dict[str, dict[int, list[str]]]:
    """The tokens with the largest logits for each layer's mean difference, by either head: plain torch.

    The final norms have no bias, nor have the heads: no difference at all has logits of 0.
    """
    assert diff.vectors is not None
    found: dict[str, dict[int, list[str]]] = {}
    for name, folder in (("base", pair.base), ("finetuned", pair.finetuned)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found[name] = {}
        for layer in readout_layers("auto", model.config.num_hidden_layers):
            vector = torch.from_numpy(diff.vectors[f"resid_post.{layer}"])
            # Of the size of a usual state: the epsilon of the norm would swallow a small one.
            vector = vector / vector.square().mean().sqrt()
            with torch.no_grad():
                logits = model.lm_head(model.model.norm(vector))
            found[name][layer] = [tokenizer.decode([i]) for i in logits.topk(N_TOKENS).indices.tolist()]
    return found


# --- what is published --------------------------------------------------------------------------


def page(results: Results) -> list[str]:
    """The measured part of docs/readout.md."""
    head = ["pair", "salient", "position", "Diff Mining"]
    for layer in ("middle", "best"):
        head += [f"mean difference, {layer} layer, {whose}’s head" for whose in _HEADS.values()]
    rows = [
        [
            p.pair,
            f"{p.n_salient:,}",
            f"`{p.position}`",
            f"{p.mined:.0%}",
            *(f"{p.mean_difference[head][_middle(p)]:.0%}" for head in _HEADS),
            *("{:.0%} ({})".format(*_best(p, head)) for head in _HEADS),
        ]
        for p in results.precision
    ]
    tokens = [
        [p.pair, _listed(p.mined_tokens), _listed(p.difference_tokens)]
        for p in results.precision
        if p.position == "all"
    ]
    losses = ", ".join(
        f"{facts.loss_before:.2f} before and {facts.loss_after:.2f} after on {name}"
        for name, facts in results.finetuned.items()
    )
    n_prompts = min(p.n_prompts for p in results.precision)
    return [
        f"{n_prompts} prompts for each pair, in float32; *salient* is the number of tokens of the vocabulary "
        "that count as right, and a best layer’s number is in parentheses. The fine-tunes on sentences have "
        "learnt these by heart: the loss on held-out sentences of the subject, in nats a token, is "
        f"{losses}.",
        table(head, rows),
        _tally(results),
        f"The first {SHOWN} tokens with `all`; those of the mean difference are of the last layer, by the "
        "fine-tuned model’s head.",
        table(["pair", "Diff Mining", "mean difference"], tokens),
    ]


_HEADS = {"base": "base", "finetuned": "fine-tuned"}


def _middle(found: Precision) -> int:
    """The middle of the model: the second of the four layers that `auto` reads."""
    return sorted(found.mean_difference["base"])[1]


def _best(found: Precision, head: str) -> tuple[float, int]:
    """The best precision of the four layers, and the latest layer that has it."""
    return max((precision, layer) for layer, precision in found.mean_difference[head].items())


def _tally(results: Results) -> str:
    """How often either is ahead, against the best layer by the fine-tuned model's head."""
    told = []
    for position in POSITIONS:
        pairs = [(p.mined, _best(p, "finetuned")[0]) for p in results.precision if p.position == position]
        ahead, behind = sum(one > other for one, other in pairs), sum(one < other for one, other in pairs)
        told.append(f"with `{position}` in {ahead} of {len(pairs)} pairs, and behind in {behind}")
    return f"Diff Mining is ahead of the best layer, by the fine-tuned model’s head, {'; '.join(told)}."


def _listed(tokens: Sequence[str]) -> str:
    return " ".join(f"`{token!r}`".replace("|", "\\|") for token in tokens[:SHOWN])


def main() -> None:
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--write-docs", action="store_true", help="write docs/readout.md from the results, without measuring"
    )
    options = parser.parse_args()
    if options.write_docs:
        results = msgspec.json.decode(RESULTS.read_bytes(), type=Results)
        fill_in(DOCS, "\n\n".join(page(results)))
    else:
        precision = [found for pair in pairs() for found in measure(pair)]
        facts = {
            name: msgspec.json.decode(
                (subjects.folder_of(name) / places.TRAINING_FACTS).read_bytes(), type=Finetuning
            )
            for name in subjects.TEXTS
        }
        results = Results(precision, facts)
        RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    console.print("\n\n".join(page(results)), highlight=False, markup=False)


if __name__ == "__main__":
    main()
