"""Results made without a model, for what renders them: every value is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from lazarus.results import (
    ActivationDiffRecord,
    AttributedGroup,
    Attribution,
    ComponentRecord,
    Environment,
    GroupContrast,
    GroupCurve,
    Groups,
    LayerRecord,
    LocalChange,
    Mined,
    MinedToken,
    ModelInfo,
    Output,
    Parting,
    PromptRecord,
    Readout,
    ReadoutToken,
    Restored,
    ResultRows,
    Settings,
    SiteRecord,
    Summary,
    TokenChoice,
    TokenTrace,
    Tool,
)

THRESHOLD = 0.1
HOSTILE = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=2</script>",
    "<!-- <script> <img src=x onerror=window.pwned=3>",
    "{{ 7 * 7 }} {% raw %} ${7*7} & &amp; \"quotes\" 'single'",
    "\u202eright to left\u202c and \u200f\u05e9\u05dc\u05d5\u05dd\u200e عربى",
    "👩‍💻 emoji \u2028 line \u2029 paragraph",
    "NUL \x00 escape \x1b[31m tab\tline\nnext",
)


def layer_record(layer: int, values: NDArray[np.float64], **changes: Any) -> LayerRecord:
    """A layer whose numbers follow from its prompts' divergences; all of them None without any."""
    finite = values[~np.isnan(values)]
    mean = mean_of(values) if finite.size else None
    fields: dict[str, Any] = {
        "layer": layer,
        "cosine_similarity": None if mean is None else 1 - mean,
        "divergence": mean,
        "flagged": mean is not None and mean > THRESHOLD,
        "n_prompts": int(finite.size),
        "relative_l2": None if mean is None else float(np.sqrt(2 * mean)),
        "norm_ratio": None if mean is None else 1 + mean / 3,
        "centered_cosine_similarity": None,
        "noise_floor": None if mean is None else 3e-7,
        "noise_floor_divergence": None if mean is None else 4.5e-14,
        "unrelated_similarity": None if mean is None else 0.3,
        "normalized_divergence": None if mean is None else mean / 0.7,
        "interval": None if mean is None else (mean * 0.8, mean * 1.3),
        "top1_share": None if mean is None else 0.1,
        "top3_share": None if mean is None else 0.2,
    }
    return LayerRecord(**{**fields, **changes})


def site_record(name: Any, values: NDArray[np.float64]) -> SiteRecord:
    """The same outside the blocks."""
    fields = msgspec.structs.asdict(layer_record(0, values))
    del fields["layer"], fields["finetuned_layer"]
    return SiteRecord(name=name, **fields)


def divergences(n_prompts: int, n_layers: int, seed: int = 0) -> NDArray[np.float64]:
    """A divergence that grows with depth, with prompts that differ by orders of magnitude.

    Only what every processor rounds alike: the golden file holds its bits.
    """
    prompt = np.arange(seed, seed + n_prompts)[:, None]
    layer = np.arange(n_layers)[None, :]
    size = 0.5 ** (prompt * 7 % 11) * (1 + prompt % 97 / 100) / 2
    values: NDArray[np.float64] = (
        size * ((layer + 1) / n_layers) ** 2 * (0.8 + (prompt * 31 + layer * 17) % 41 / 100)
    )
    return values


def mean_of(values: NDArray[np.float64]) -> float:
    """The mean of the finite ones, the same everywhere."""
    finite = values[~np.isnan(values)]
    return math.fsum(finite) / finite.size


def record_of(
    values: NDArray[np.float64], texts: Sequence[str] | None = None, **changes: Any
) -> ActivationDiffRecord:
    """A result with these divergences, [prompts, layers]; fields as given in `changes`."""
    n_prompts, n_layers = values.shape
    texts = [f"Prompt number {i}" for i in range(n_prompts)] if texts is None else texts
    layers = [layer_record(i, values[:, i]) for i in range(n_layers)]
    means = [layer.divergence for layer in layers]
    most = max((m for m in means if m is not None), default=None)
    flagged = [layer.layer for layer in layers if layer.flagged]
    fields: dict[str, Any] = {
        "schema_version": "1.0",
        "command": "activation-diff",
        "tool": Tool(name="lazarus", version="0.0.0"),
        "created": "2026-01-02T03:04:05+00:00",
        "base": model("org/base", n_layers),
        "finetuned": model("org/finetuned", n_layers),
        "settings": settings(),
        "environment": Environment(
            python="3.12.0",
            platform="a platform",
            torch="2.8.0",
            transformers="5.24.0",
            device_name="cpu",
            n_threads=1,
        ),
        "prompts": [
            PromptRecord(index=i, text=text, group=None, n_tokens=3 + i % 7, rendered=None)
            for i, text in enumerate(texts)
        ],
        "layers": layers,
        "sites": [site_record("embedding", values[:, 0] / 2), site_record("final_norm", values[:, -1])],
        "results": ResultRows(texts, {"divergence": values, "cosine_similarity": 1 - values}),
        "summary": Summary(
            most_divergent_layer=None if most is None else means.index(most),
            max_divergence=most,
            first_flagged_layer=flagged[0] if flagged else None,
            n_flagged_layers=len(flagged),
            verdict="changed" if most else None,
            causes=[],
            weights_identical=False,
            onset_layer=0 if most else None,
        ),
        "notes": [],
    }
    return ActivationDiffRecord(**{**fields, **changes})


def whole_record(n_prompts: int = 12, n_layers: int = 6) -> ActivationDiffRecord:
    """A result with everything that can be measured: hostile prompts, gaps, groups, tokens, a readout."""
    values = divergences(n_prompts, n_layers)
    values[1, 2] = np.nan
    texts = [*HOSTILE, *(f"Prompt number {i}" for i in range(n_prompts))][:n_prompts]
    record = record_of(values, texts)
    names = ["arithmetic", "<b>prose</b>"]
    prompts = [msgspec.structs.replace(p, group=names[p.index % 2]) for p in record.prompts]
    local = [
        msgspec.structs.replace(
            layer, local=LocalChange(relative_l2=0.0 if i % 3 else 0.02 + i / 100, cosine_similarity=0.99)
        )
        for i, layer in enumerate(record.layers)
    ]
    return msgspec.structs.replace(
        record,
        prompts=prompts,
        layers=local,
        settings=settings(localize=True, sites="all", attribute="blocks", readout="auto", position="all"),
        components=_components(n_layers),
        attribution=_attribution(n_layers),
        results=ResultRows(texts, {**record.results.columns, "nats": values / 10 - 0.01}),
        groups=_groups(values, names),
        output=_output(),
        mined=_mined(),
        readout=[_readout(n_layers // 2), _readout(n_layers - 1)],
        tokens=[token_trace(i, text, n_layers) for i, text in enumerate(texts[:4])],
        summary=msgspec.structs.replace(record.summary, most_changed_block=3),
        notes=["12 prompts: intervals of so few are rough", "layer 2: prompt 1 <b>left out</b>: not finite"],
    )


def _components(n_layers: int) -> list[ComponentRecord]:
    """What is inside each block: one that was not measured, and routers in every other block."""
    names: tuple[Literal["attn_out", "mlp_out", "router"], ...] = ("attn_out", "mlp_out", "router")
    return [
        ComponentRecord(
            layer=layer,
            name=name,
            divergence=None if (layer, name) == (2, "mlp_out") else 0.01 * (layer + 1) / (place + 1),
            relative_l2=0.1,
            norm_ratio=1.01,
            n_prompts=12,
            noise_floor=1e-6,
            noise_floor_divergence=1e-4,
            local=LocalChange(relative_l2=0.02, cosine_similarity=0.99),
            expert_agreement=0.97 if name == "router" else None,
            expert_agreement_noise=0.99 if name == "router" else None,
            flipped_share=0.05 if name == "router" else None,
            flipped_share_noise=0.02 if name == "router" else None,
            flipped_change_share=0.4 if name == "router" else None,
            flipped_change_share_noise=0.1 if name == "router" else None,
        )
        for layer in range(n_layers)
        for place, name in enumerate(names)
        if name != "router" or layer % 2
    ]


def _attribution(n_layers: int) -> Attribution:
    """Parts of blocks, one of them below 0, and of the head."""
    nats = [0.05 * layer - 0.02 for layer in range(n_layers)]
    groups = [
        AttributedGroup(
            name=f"block {layer}", layer=layer, component=None, nats=value, share=value, interval=(-0.1, 0.4)
        )
        for layer, value in enumerate(nats)
    ]
    head = AttributedGroup(name="<b>head</b>", layer=None, component=None, nats=0.3, share=0.3, interval=None)
    total = sum(nats) + 0.3
    return Attribution(
        kl=total + 0.001,
        sum=total,
        completeness_error=0.001 / (total + 0.001),
        n_points=4,
        groups=[*groups, head],
        restored=[Restored(groups=["<b>head</b>"], kl=0.4)],
    )


def token_trace(index: int, text: str, n_layers: int) -> TokenTrace:
    """Every word a token; the first value is not finite."""
    tokens = text.split(" ")
    values: list[list[float | None]] = [
        [float(v) for v in row] for row in divergences(len(tokens), n_layers, index)
    ]
    values[0][0] = None
    positions = list(range(1, len(tokens) + 1))
    choices = [
        [
            [
                TokenChoice(token=f"{name} {token}"[:40], token_id=0, probability=0.75),
                TokenChoice(token="</script>\n", token_id=7, probability=0.0625),
            ]
            for token in tokens
        ]
        for name in ("base's", "other's")
    ]
    agrees: list[bool | None] = [i != len(tokens) // 2 for i in range(len(tokens))]
    kl: list[float | None] = [float(values[i][-1] or 0.0) / 3 for i in range(len(tokens))]
    kl[0], agrees[0], choices[0][0], choices[1][0] = None, None, [], []
    parting = Parting(
        position=positions[len(tokens) // 2],
        token_base="<b>base</b>",
        token_finetuned="\u202eother",
        margin_base=0.5,
        margin_finetuned=1.25,
        noise_margin=0.001,
        cause="change",
    )
    return TokenTrace(
        prompt_index=index,
        positions=positions,
        tokens=tokens,
        divergence=values,
        kl=kl,
        agrees=agrees,
        base_choices=choices[0],
        finetuned_choices=choices[1],
        parting=parting if len(tokens) > 1 else None,
    )


def cka_record() -> ActivationDiffRecord:
    """Two models of different width: nothing but CKA, and not at every layer."""
    values = np.full((5, 6), np.nan)
    record = record_of(values)
    layers = [
        msgspec.structs.replace(layer, cka=None if i == 3 else 0.9 - i / 20, finetuned_layer=2 * i)
        for i, layer in enumerate(record.layers)
    ]
    return msgspec.structs.replace(
        record,
        layers=layers,
        finetuned=model("org/finetuned", 12, hidden_size=16),
        notes=["the widths differ: only CKA is given", "layer 3: CKA is not finite"],
    )


def model(name: str, n_layers: int, hidden_size: int = 8) -> ModelInfo:
    """A model of that name and shape."""
    return ModelInfo(
        id=name,
        revision=None,
        kind="folder",
        architecture="LlamaForCausalLM",
        n_layers=n_layers,
        hidden_size=hidden_size,
        stored_dtype="float32",
        run_dtype="float32",
        attention="sdpa",
        adapter=None,
    )


def settings(**changes: Any) -> Settings:
    """The settings of a plain run."""
    fields: dict[str, Any] = {
        "position": "last",
        "threshold": THRESHOLD,
        "dtype": "float32",
        "device": "cpu",
        "batch_tokens": 512,
        "chat_template": "none",
        "memory": "resident",
        "align": "ids",
        "localize": False,
        "readout": None,
        "noise_floor": True,
        "fail_above": None,
        "expect": None,
        "no_split": False,
        "truncate": False,
        "layers_path": None,
        "seed": 0,
        "trust_remote_code": False,
    }
    return Settings(**{**fields, **changes})


def _groups(values: NDArray[np.float64], names: Sequence[str]) -> Groups:
    means = [[mean_of(column) for column in values[i::2].T] for i in (0, 1)]
    ratio = [math.log(a) - math.log(b) for a, b in zip(*means, strict=True)]
    return Groups(
        curves=[
            GroupCurve(group=name, n_prompts=len(values[i::2]), divergence=list(means[i]))
            for i, name in enumerate(names)
        ],
        contrasts=[
            GroupContrast(
                group_a=names[0],
                group_b=names[1],
                log_ratio=list(ratio),
                p_value=0.0123,
                layer=ratio.index(max(ratio)),
            )
        ],
    )


def _output() -> Output:
    return Output(
        kl_base_finetuned=0.5,
        kl_finetuned_base=0.25,
        js=0.1,
        top1_agreement=0.75,
        base_rank_of_finetuned_top1=1.5,
        logits_relative_l2=0.4,
        noise_floor=5e-7,
    )


def _mined() -> Mined:
    tokens = [
        MinedToken(token=t, token_id=i, frequency=0.75 - i / 10)
        for i, t in enumerate([" a", "<i>", "\n", "\u202eb"])
    ]
    return Mined(k=100, n_tokens=5000, n_positions=1234, promoted=tokens, suppressed=tokens[:1])


def _readout(layer: int) -> Readout:
    tokens = [
        ReadoutToken(token=t, token_id=i, score=3.5 - i) for i, t in enumerate([" a", "<i>", "\n", "\u202eb"])
    ]
    return Readout(
        layer=layer,
        base_promoted=tokens,
        base_suppressed=tokens[::-1],
        finetuned_promoted=tokens[:2],
        finetuned_suppressed=[],
        static_share=0.25,
    )
