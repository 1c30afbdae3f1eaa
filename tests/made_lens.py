"""Results of compare made without a model, for what renders them: every value is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from lazarus.results import (
    CompareRecord,
    Environment,
    LensLayer,
    LensModel,
    LensPair,
    LensSettings,
    LensSummary,
    LensToken,
    TokenEvolution,
    Tool,
)
from made_records import HOSTILE, model

VOCABULARY = (" Paris", " London", ":", "42", " the", "\n", "  ", "'s", " a", "é")
HOSTILE_VOCABULARY = (*HOSTILE, "half \ud800 of one", "", "\u200b", " Paris")
PROMPT = "The capital of France is"


def lens_record(
    n_layers: tuple[int, int] = (4, 4),
    *,
    top_k: int = 5,
    vocabulary: Sequence[str] = VOCABULARY,
    targets: tuple[int, int] = (0, 1),
    **changes: Any,
) -> CompareRecord:
    """Two models that end with these tokens, which emerge half-way; fields as given in `changes`.

    Nothing is measured of it but the numbers in it: they are sums and quotients of whole numbers.
    """
    shares = [_shares(n, len(vocabulary), target) for n, target in zip(n_layers, targets, strict=True)]
    tracked = list(dict.fromkeys(targets))
    pairs = [_pair(i, shares, n_layers) for i in range(n_layers[0])]
    most = max(pairs, key=lambda pair: pair.js or 0.0)
    models = [
        lens_model(f"org/model{i + 1}", share, vocabulary, tracked, top_k) for i, share in enumerate(shares)
    ]
    fields: dict[str, Any] = {
        "schema_version": "1.0",
        "command": "compare",
        "tool": Tool(name="lazarus", version="0.0.0"),
        "created": "2026-01-02T03:04:05+00:00",
        "model1": models[0],
        "model2": models[1],
        "settings": lens_settings(top_k=top_k),
        "environment": Environment(
            python="3.12.0",
            platform="a platform",
            torch="2.8.0",
            transformers="5.24.0",
            device_name="cpu",
            n_threads=1,
        ),
        "prompt": PROMPT,
        "tracked": [vocabulary[i] for i in tracked],
        "layers": pairs,
        "summary": LensSummary(
            same_first_choice=targets[0] == targets[1],
            most_divergent_layer=most.layer,
            max_js=most.js,
            same_vocabulary=True,
        ),
        "notes": [],
    }
    return CompareRecord(**{**fields, **changes})


def lens_model(
    name: str,
    shares: Sequence[Sequence[float]],
    vocabulary: Sequence[str],
    tracked: Sequence[int],
    top_k: int,
) -> LensModel:
    """A model whose lens reads these probabilities, [layers, vocabulary]."""
    return LensModel(
        info=model(name, len(shares)),
        n_vocabulary=len(vocabulary),
        prompt_tokens=["The", " capital", " of", " France", " is"],
        rendered=None,
        layers=[
            LensLayer(
                layer=i,
                top=[
                    LensToken(token=vocabulary[v], token_id=v, probability=row[v])
                    for v in sorted(range(len(row)), key=lambda v: -row[v])[:top_k]
                ],
            )
            for i, row in enumerate(shares)
        ],
        tracked=[_evolution(vocabulary[v], v, shares) for v in tracked],
    )


def unmeasured_record() -> CompareRecord:
    """Half of it null: model 2 reads nothing after its last layer, and lacks a tracked token."""
    record = lens_record()
    layers = [*record.model2.layers[:-1], replace(record.model2.layers[-1], top=[])]
    layers[1] = replace(layers[1], top=[replace(token, probability=None) for token in layers[1].top])
    first, second = record.model2.tracked
    broken = replace(first, emergence_layer=None, final_probability=None)
    broken = replace(broken, probability=[*first.probability[:-1], None], rank=[*first.rank[:-1], None])
    absent = replace(second, token=None, token_id=None, emergence_layer=None, final_probability=None)
    absent = replace(absent, probability=[None] * 4, rank=[None] * 4)
    pairs = [
        replace(pair, kl_1_2=None, kl_2_1=None, js=None, same_first_choice=None) for pair in record.layers
    ]
    return replace(
        record,
        model2=replace(record.model2, layers=layers, tracked=[broken, absent]),
        layers=pairs,
        summary=replace(record.summary, same_first_choice=None, most_divergent_layer=None, max_js=None),
        notes=["org/model2, layer 3: its logits are not finite"],
    )


def hostile_record() -> CompareRecord:
    """Texts that would break a page, a line or a table, wherever a text may stand."""
    record = lens_record(
        (5, 3), top_k=12, vocabulary=HOSTILE_VOCABULARY, targets=(0, 4), prompt="\n".join(HOSTILE)
    )
    return replace(
        record,
        model1=replace(record.model1, info=model(HOSTILE[0], 5), prompt_tokens=list(HOSTILE)),
        model2=replace(record.model2, info=model("$x_1$ | `b`\n", 3), rendered=HOSTILE[1]),
        tracked=[HOSTILE[0], "a | b\n"],
        notes=list(HOSTILE),
    )


def lens_settings(**changes: Any) -> LensSettings:
    """The settings of a plain run."""
    fields: dict[str, Any] = {
        "top_k": 5,
        "track": None,
        "dtype": "float32",
        "device": "cpu",
        "chat_template": "none",
        "truncate": False,
        "layers_path": None,
        "seed": 0,
        "trust_remote_code": False,
    }
    return LensSettings(**{**fields, **changes})


def _shares(n_layers: int, n_tokens: int, target: int) -> list[list[float]]:
    """Whole numbers over their sum; the target's grows until it is the largest from half-way on."""
    rows = []
    for layer in range(n_layers):
        weights = [1 + (token * 7 + layer * 3) % 11 for token in range(n_tokens)]
        weights[target] = 40 * (layer + 1) // n_layers if layer >= n_layers // 2 else 1
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def _evolution(token: str, token_id: int, shares: Sequence[Sequence[float]]) -> TokenEvolution:
    ranks: list[int | None] = [1 + sum(other > row[token_id] for other in row) for row in shares]
    later = [i for i in range(len(ranks)) if all(rank == 1 for rank in ranks[i:])]
    return TokenEvolution(
        tracked=token,
        token=token,
        token_id=token_id,
        emergence_layer=min(later, default=None),
        final_probability=shares[-1][token_id],
        probability=[row[token_id] for row in shares],
        rank=ranks,
    )


def _pair(layer: int, shares: Sequence[Sequence[Sequence[float]]], n_layers: tuple[int, int]) -> LensPair:
    other = min(n_layers[1] - 1, (layer + 1) * n_layers[1] // n_layers[0] - 1) if layer else 0
    p, q = shares[0][layer], shares[1][max(0, other)]
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return LensPair(
        layer=layer,
        model2_layer=max(0, other),
        kl_1_2=_kl(p, q),
        kl_2_1=_kl(q, p),
        js=(_kl(p, middle) + _kl(q, middle)) / 2,
        same_first_choice=p.index(max(p)) == q.index(max(q)),
    )


def _kl(p: Sequence[float], q: Sequence[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
