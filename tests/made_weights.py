"""Results of weight-diff made without a model, for what renders them: every value is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from lazarus.results import (
    CheckpointInfo,
    Environment,
    Spectrum,
    TensorRecord,
    Tool,
    UnmatchedTensor,
    WeightDiffRecord,
    WeightLayerRecord,
    WeightSettings,
    WeightSummary,
)

THRESHOLD = 0.1
SHAPES = {
    "attn_norm": [64],
    "attn_q": [64, 64],
    "attn_k": [32, 64],
    "attn_v": [32, 64],
    "attn_o": [64, 64],
    "mlp_norm": [64],
    "mlp_gate": [192, 64],
    "mlp_up": [192, 64],
    "mlp_down": [64, 192],
}
FILES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
}


def tensor(
    layer: int | None, component: str, relative: float | None, shape: Sequence[int] = (64, 64), **changes: Any
) -> TensorRecord:
    """A tensor whose numbers follow from its relative change; a base of norm 2."""
    file = FILES.get(component, component)
    count = math.prod(shape)
    n_changed = 0 if relative == 0 else count - 1
    fields: dict[str, Any] = {
        "layer": layer,
        "component": component,
        "name": f"model.{file}.weight" if layer is None else f"model.layers.{layer}.{file}.weight",
        "shape": list(shape),
        "base_dtype": "float32",
        "finetuned_dtype": "float32",
        "relative_change": relative,
        "flagged": relative is not None and relative > THRESHOLD,
        "cosine_similarity": None if relative is None else 1 - relative**2 / 2,
        "max_abs_change": None if relative is None else relative / 4,
        "share_changed": n_changed / count,
        "n_changed": n_changed,
        "base_norm": 2.0,
        "change_norm": None if relative is None else 2 * relative,
    }
    return TensorRecord(**{**fields, **changes})


def spectrum(count: int, rank: int | None = 4) -> Spectrum:
    """The spectrum of an update: `rank` equal singular values and a rest, or a slow decay without one."""
    decay = [0.9**k for k in range(count)]
    values = decay if rank is None else [1.0 if k < rank else 0.001 for k in range(count)]
    return Spectrum(
        method="exact",
        n_singular_values=count,
        spectral_norm=values[0],
        stable_rank=sum(v * v for v in values),
        effective_rank=12.25 if rank is None else rank + 0.5,
        rank_90=rank or 11,
        share_computed=1.0,
        rounding_norm=0.0,
        adapter_rank=rank,
        singular_values=values[:32],
    )


def change(layer: int, place: int, n_layers: int) -> float:
    """A relative change that grows with depth; only what every processor rounds alike."""
    return (
        (1 + layer) ** 2
        / n_layers**2
        * (0.5 ** (place * 7 % 11))
        * (0.8 + (place * 31 + layer * 17) % 41 / 100)
    )


def layer_rows(n_layers: int, scale: float = 0.25) -> list[TensorRecord]:
    """Every component of every layer, norms unchanged."""
    return [
        tensor(
            layer,
            name,
            0.0 if name.endswith("norm") else scale * change(layer, place, n_layers),
            shape,
        )
        for layer in range(n_layers)
        for place, (name, shape) in enumerate(SHAPES.items())
    ]


def record_of(rows: Sequence[TensorRecord], **changes: Any) -> WeightDiffRecord:
    """A result with these tensors; fields as given in `changes`."""
    unmatched = changes.get("unmatched", [])
    layers = [_layer(n, rows) for n in sorted({row.layer for row in rows if row.layer is not None})]
    fields: dict[str, Any] = {
        "schema_version": "1.0",
        "command": "weight-diff",
        "tool": Tool(name="lazarus", version="0.0.0"),
        "created": "2026-01-02T03:04:05+00:00",
        "base": checkpoint("org/base", len(layers), len(rows)),
        "finetuned": checkpoint("org/finetuned", len(layers), len(rows)),
        "settings": settings(spectrum=any(row.spectrum for row in rows)),
        "environment": Environment(
            python="3.12.0",
            platform="a platform",
            torch="2.8.0",
            transformers="5.24.0",
            device_name="a processor",
            n_threads=1,
        ),
        "layers": layers,
        "results": list(rows),
        "unmatched": unmatched,
        "summary": summary(rows, unmatched),
        "notes": [],
    }
    return WeightDiffRecord(**{**fields, **changes})


def summary(rows: Sequence[TensorRecord], unmatched: Sequence[UnmatchedTensor] = ()) -> WeightSummary:
    """The summary of these rows."""
    changed = [row for row in rows if row.n_changed]
    ranked = sorted(range(len(rows)), key=lambda i: -(rows[i].relative_change or 0.0))
    found = [row.spectrum for row in rows if row.spectrum]
    ranks = [s.adapter_rank for s in found if s.adapter_rank is not None]
    return WeightSummary(
        verdict="changed" if changed or unmatched else "identical",
        causes=[],
        relative_change=together(rows),
        n_tensors=len(rows),
        n_changed_tensors=len(changed),
        n_flagged_tensors=sum(row.flagged for row in rows),
        n_unmatched=len(unmatched),
        most_changed=[i for i in ranked[:5] if rows[i].relative_change],
        first_changed_layer=min((row.layer for row in changed if row.layer is not None), default=None),
        n_matrices=len(found) if found else None,
        n_low_rank=len(ranks) if found else None,
        adapter_rank=max(ranks) if found and len(ranks) == len(found) else None,
    )


def together(rows: Sequence[TensorRecord]) -> float | None:
    """The relative change of all rows as one."""
    if not rows or any(row.change_norm is None or row.base_norm is None for row in rows):
        return None
    base = math.sqrt(math.fsum((row.base_norm or 0.0) ** 2 for row in rows))
    return math.sqrt(math.fsum((row.change_norm or 0.0) ** 2 for row in rows)) / base if base else None


def whole_record(n_layers: int = 12) -> WeightDiffRecord:
    """A result with everything: spectra, a tensor without a change, one that is not finite, one unmatched."""
    rows = [tensor(None, "embed", 0.00399, [320, 64]), *layer_rows(n_layers)]
    rows[1 + len(SHAPES)] = tensor(1, "attn_norm", None, [64])
    rows[2 + len(SHAPES)] = tensor(1, "attn_q", 3e-8)
    rows += [tensor(None, "final_norm", 0.0, [64]), tensor(None, "lm_head", 0.00399, [320, 64])]
    rows = [
        msgspec.structs.replace(
            row, spectrum=spectrum(min(row.shape), 4 if row.component != "mlp_up" else None)
        )
        if len(row.shape) > 1 and row.n_changed
        else row
        for row in rows
    ]
    unmatched = [
        UnmatchedTensor(
            layer=None,
            component="visual.proj",
            name="visual.proj.weight",
            base_shape=None,
            finetuned_shape=[8, 64],
        ),
        UnmatchedTensor(
            layer=2, component="attn_q.bias", name="model.layers.2.b", base_shape=[64], finetuned_shape=[32]
        ),
    ]
    return record_of(rows, unmatched=unmatched, notes=["2 tensors <b>have no counterpart</b>", "one more"])


def expert_record(n_layers: int = 48, n_experts: int = 128) -> WeightDiffRecord:
    """A mixture of experts."""
    rows = [tensor(None, "embed", 0.001)]
    for layer in range(n_layers):
        rows += layer_rows(n_layers)[layer * len(SHAPES) : (layer + 1) * len(SHAPES) - 3]
        rows.append(tensor(layer, "router", 0.01, [n_experts, 64]))
        for expert in range(n_experts):
            for part in ("mlp_gate", "mlp_up", "mlp_down"):
                value = 0.3 * change(layer, expert, n_layers)
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part.removeprefix('mlp_')}_proj.weight"
                rows.append(tensor(layer, f"expert_{expert}.{part}", value, name=name))
    return record_of(rows)


def checkpoint(name: str, n_layers: int, n_tensors: int) -> CheckpointInfo:
    """A checkpoint of that name and size."""
    return CheckpointInfo(
        id=name,
        revision=None,
        kind="folder",
        family="llama",
        architecture="LlamaForCausalLM",
        n_layers=n_layers,
        n_tensors=n_tensors,
        n_parameters=n_tensors * 4096,
        stored_dtype="float32",
        adapter=None,
    )


def settings(**changes: Any) -> WeightSettings:
    """The settings of a plain run."""
    fields: dict[str, Any] = {
        "threshold": THRESHOLD,
        "spectrum": False,
        "fail_above": None,
        "expect": None,
        "layers_path": None,
        "seed": 0,
        "allow_pickle": False,
        "trust_remote_code": False,
    }
    return WeightSettings(**{**fields, **changes})


def _layer(number: int, rows: Sequence[TensorRecord]) -> WeightLayerRecord:
    own = [row for row in rows if row.layer == number]
    return WeightLayerRecord(
        layer=number,
        relative_change=together(own),
        n_tensors=len(own),
        n_changed_tensors=sum(row.n_changed > 0 for row in own),
    )
