"""Every architecture against an oracle: right, or refused with a reason; never wrong.

Each is built tiny and random from transformers' own configuration. Four prompts of unequal lengths go
through `activation_diff` in padded batches; the oracle runs each alone, unpadded, through the whole
model. `docs/architectures.md` is written from what is found here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from transformers import PreTrainedModel

import lazarus
from architectures import (
    CAUSAL,
    ENCODER_DECODERS,
    ENCODERS,
    MULTIMODAL,
    REFUSED,
    UNBUILDABLE,
    WITHOUT_COMPONENTS,
    WITHOUT_HEAD,
    WITHOUT_READOUT,
    build,
    swept,
)
from factories import notes_of, notes_on_models, perturbed, word_tokenizer
from lazarus.messages import in_flags
from lazarus.models import dissect
from reference import Convention, block_outputs, convention_of, cosine, recorded_states

ALL = (*CAUSAL, *ENCODERS, *ENCODER_DECODERS, *MULTIMODAL)
BUILT = tuple(name for name in ALL if name not in UNBUILDABLE)
PROMPTS = (
    [11, 45, 7, 93, 30, 62, 18, 77, 24, 50, 36, 81],
    [64, 9, 28, 71, 40],
    [33, 88],
    [59, 14, 72, 21, 66, 47, 95],
)
TEXTS = [" ".join(f"t{i}" for i in ids) for ids in PROMPTS]

BIDIRECTIONAL = {"xlnet"}
"""Causal language models by name whose plain forward pass lets every token see every other."""


@dataclass(frozen=True)
class Finding:
    """What one architecture showed."""

    head: str
    n_layers: int
    position: str
    convention: Convention
    worst: float
    worst_site: float
    notes: tuple[str, ...]
    refusal: str = ""


@cache
def examine(name: str) -> Finding:
    """Compare a model with a perturbed copy through lazarus and through the oracle."""
    model = build(name)
    changed = perturbed(model, 0.05)
    tokenizer = word_tokenizer()
    try:
        diff = lazarus.activation_diff(model, changed, TEXTS, tokenizer=tokenizer, position="all")
        auto = lazarus.activation_diff(model, changed, TEXTS[:1], tokenizer=tokenizer)
    except lazarus.LazarusError as error:
        return Finding(type(model).__name__, 0, "", "none", 0.0, 0.0, (), in_flags(error.marked))
    expected, convention = oracle(model, changed)
    found = diff.results.column("cosine_similarity")
    return Finding(
        head=type(model).__name__,
        n_layers=len(diff.layers),
        position=auto.record.settings.position,
        convention=convention,
        worst=float(np.abs(found - expected).max()),
        worst_site=max(
            (
                abs((site.cosine_similarity or 0.0) - site_oracle(model, changed, site.name))
                for site in diff.sites
                if convention == "standard"
            ),
            default=0.0,
        ),
        # What lies outside the comparison says nothing of how the architecture runs.
        notes=tuple(note for note in notes_on_models(diff) if note not in notes_of(diff, "not-compared")),
    )


def oracle(model: PreTrainedModel, changed: PreTrainedModel) -> tuple[np.ndarray, Convention]:
    """The cosine of each prompt and layer, [prompts, layers], all tokens but the first."""
    rows, conventions = [], set()
    for ids in PROMPTS:
        base = block_outputs(model, dissect(model).blocks, ids)
        finetuned = block_outputs(changed, dissect(changed).blocks, ids)
        conventions.add(convention_of(recorded_states(model, ids), base))
        rows.append([cosine(b[1:], f[1:]).mean() for b, f in zip(base, finetuned, strict=True)])
    assert len(conventions) == 1, conventions
    return np.array(rows), conventions.pop()


def site_oracle(model: PreTrainedModel, changed: PreTrainedModel, site: str) -> float:
    """The cosine at the ends of transformers' own list: what enters block 0, and the last hidden state."""
    entry = {"embedding": 0, "final_norm": -1}[site]
    pairs = [(recorded_states(model, ids)[entry], recorded_states(changed, ids)[entry]) for ids in PROMPTS]
    return float(np.mean([cosine(b[1:], f[1:]).mean() for b, f in pairs]))


@pytest.mark.parametrize("name", BUILT)
def test_equals_the_oracle_or_is_refused_with_the_reason(name: str) -> None:
    finding = examine(name)
    if name in REFUSED:
        assert REFUSED[name] in finding.refusal
    else:
        assert finding.refusal == ""
        assert finding.worst <= 1e-6
        if name != "gemma3n_text":  # its list ends before the streams are joined and normed
            assert finding.worst_site <= 1e-6
        assert finding.position == ("last" if name in CAUSAL and name not in BIDIRECTIONAL else "mean")


@pytest.mark.parametrize("name", swept(name for name in BUILT if name not in REFUSED))
def test_a_model_against_itself_is_exactly_the_same(name: str) -> None:
    model = build(name)
    diff = lazarus.activation_diff(model, model, TEXTS, tokenizer=word_tokenizer(), position="all")
    assert [layer.divergence for layer in diff.layers] == [0.0] * len(diff.layers)
    assert [site.divergence for site in diff.sites] == [0.0] * len(diff.sites)


def test_most_agree_with_what_transformers_records() -> None:
    findings = [examine(name) for name in BUILT if name not in REFUSED]
    agreeing = [finding for finding in findings if finding.convention != "none"]
    assert len(agreeing) >= 0.9 * len(findings)


def test_the_page_of_architectures_is_what_was_found(golden: Callable[[str, str], None]) -> None:
    golden("../../docs/architectures.md", page())


def page() -> str:
    """The page of the documentation, from the findings."""
    rows = [row(name) for name in BUILT]
    n_right = sum(name not in REFUSED for name in BUILT)
    refused = [f"| `{name}` | {examine(name).refusal} |" for name in BUILT if name in REFUSED]
    unbuilt = [f"| `{name}` | {reason} |" for name, reason in sorted(UNBUILDABLE.items())]
    compared = [name for name in CAUSAL if name not in UNBUILDABLE and name not in REFUSED]
    n_inside = len(compared) - len(WITHOUT_COMPONENTS)
    return "\n".join(
        [
            "# Architectures",
            "",
            "Lazarus finds a model's blocks by its structure and learns how they behave from one short",
            "pass, so there is no list of families in it. This page is written by the test over every",
            "causal language model of transformers (and encoders, encoder-decoders and a multimodal one):",
            "each is built tiny with random weights, compared with a changed copy in padded batches, and",
            "held against an oracle that runs each prompt alone.",
            "",
            f"{n_right} of {len(ALL)} are right: every layer's cosine similarity is within 1e-6 of the",
            f"oracle in float32, at every token. {len(refused)} are refused with a reason, and",
            f"{len(unbuilt)} could not be built for the test.",
            "",
            "`hidden_states` says whether transformers' own list of hidden states agrees with the blocks:",
            "entry i + 1 is block i's output (standard), entry i is (shifted), or neither. The oracle does",
            "not depend on it.",
            "",
            "| model type | class | `auto` position | `hidden_states` | remarks |",
            "|---|---|---|---|---|",
            *[line for line in rows if line],
            "",
            "## Local change, output and readout",
            "",
            "`--localize` is right for every causal one of them: with one block changed, the local change is",
            "exactly 0 in every other. The effect on the output and `--readout` run a model's own head by",
            "itself, which must give the logits of the whole model within 1e-5. They are refused, or left",
            "out with a note, for these:",
            "",
            "| model type | effect on the output | `--readout` | why |",
            "|---|---|---|---|",
            *[
                f"| `{name}` | {'no' if name in WITHOUT_HEAD else 'yes'} | no | {reason} |"
                for name, reason in sorted(WITHOUT_READOUT.items())
            ],
            "",
            "## Inside the blocks",
            "",
            "`--sites all` finds the attention and MLP outputs of a block by the sum that they must give",
            f"with what enters it: in {n_inside} of {len(compared)} causal ones.",
            "In the others a norm stands after the sum, or the residual stream is mixed otherwise:",
            f"{', '.join(f'`{name}`' for name in sorted(WITHOUT_COMPONENTS))}.",
            "",
            "## Refused",
            "",
            "| model type | the message |",
            "|---|---|",
            *refused,
            "",
            "## Not built for the test",
            "",
            "| model type | why |",
            "|---|---|",
            *unbuilt,
            "",
        ]
    )


def row(name: str) -> str:
    """One architecture's line, empty for one that is refused."""
    if name in REFUSED:
        return ""
    finding = examine(name)
    remarks = "; ".join(note.split(": ", 1)[-1] for note in finding.notes if "one token" not in note)
    return f"| `{name}` | {finding.head} | {finding.position} | {finding.convention} | {remarks} |"
