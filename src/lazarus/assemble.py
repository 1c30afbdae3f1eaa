"""From what a run measured to the record that comes back."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
import transformers

from lazarus.engine import Conventions, ModelPair, Site
from lazarus.errors import NoDataError
from lazarus.metrics import PromptMeans, mean_over_prompts
from lazarus.models import LoadedModel
from lazarus.options import Options
from lazarus.prompts import Prompt
from lazarus.results import (
    SCHEMA_VERSION,
    ActivationDiffRecord,
    Environment,
    LayerRecord,
    ModelInfo,
    PromptRecord,
    ResultRows,
    Settings,
    SiteRecord,
    Summary,
    Tool,
    finite_or_none,
)
from lazarus.tokens import TokenizedPrompt, listed
from lazarus.version import __version__

Means = Mapping[Site, PromptMeans]


@dataclass(frozen=True)
class RunFacts:
    """The options, and what their `auto` came to."""

    options: Options
    device: torch.device
    position: Literal["last", "mean", "all"] | int
    batch_tokens: int


def assemble(
    pair: ModelPair,
    facts: RunFacts,
    prompts: Sequence[Prompt],
    tokenized: Sequence[TokenizedPrompt],
    means: Means,
    notes: Sequence[str],
) -> ActivationDiffRecord:
    """The whole record of a run.

    Raises:
        NoDataError: no layer has one finite pair of states.
    """
    threshold = facts.options.threshold
    layers = [
        LayerRecord(layer=site, **_measures(means[site], threshold))
        for site in pair.sites
        if isinstance(site, int)
    ]
    if all(layer.n_prompts == 0 for layer in layers):
        raise NoDataError(_why_no_data(pair))
    return ActivationDiffRecord(
        schema_version=SCHEMA_VERSION,
        command="activation-diff",
        tool=Tool(name="lazarus", version=__version__),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        base=_model_info(pair.base, pair.base_conventions),
        finetuned=_model_info(pair.finetuned, pair.finetuned_conventions),
        settings=_settings(pair, facts),
        environment=_environment(facts.device),
        prompts=[
            PromptRecord(
                index=index,
                text=prompt.text,
                group=prompt.group,
                n_tokens=len(tokens.ids),
                rendered=tokens.rendered,
            )
            for index, (prompt, tokens) in enumerate(zip(prompts, tokenized, strict=True))
        ],
        layers=layers,
        sites=[
            SiteRecord(name=site, **_measures(means[site], threshold))
            for site in pair.sites
            if not isinstance(site, int)
        ],
        results=_rows(prompts, means, len(layers)),
        summary=_summary(layers),
        notes=list(dict.fromkeys([*notes, *_exclusions(pair, means)])),
    )


def _measures(means: PromptMeans, threshold: float) -> dict[str, Any]:
    """One site's numbers, the mean over prompts of each prompt's mean."""
    found = {name: mean_over_prompts(values) for name, values in means.means().items()}
    divergence = found["divergence"]
    return {
        "cosine_similarity": finite_or_none(1 - divergence),
        "divergence": finite_or_none(divergence),
        "flagged": divergence > threshold,
        "n_prompts": int((means.n_rows > 0).sum()),
        "relative_l2": finite_or_none(found["relative_l2"]),
        "norm_ratio": finite_or_none(found["norm_ratio"]),
        "centered_cosine_similarity": finite_or_none(1 - found["centered_divergence"]),
    }


def _rows(prompts: Sequence[Prompt], means: Means, n_layers: int) -> ResultRows:
    by_layer = [means[layer].means() for layer in range(n_layers)]
    columns = {
        name: np.stack([values[name] for values in by_layer], axis=1)
        for name in ("divergence", "relative_l2", "norm_ratio")
    }
    columns["cosine_similarity"] = 1 - columns["divergence"]
    columns["centered_cosine_similarity"] = 1 - np.stack(
        [values["centered_divergence"] for values in by_layer], axis=1
    )
    return ResultRows([prompt.text for prompt in prompts], columns)


def _summary(layers: Sequence[LayerRecord]) -> Summary:
    measured = [layer for layer in layers if layer.divergence is not None]
    largest = max(measured, key=lambda layer: layer.divergence or 0.0)
    flagged = [layer.layer for layer in layers if layer.flagged]
    return Summary(
        most_divergent_layer=largest.layer,
        max_divergence=largest.divergence,
        first_flagged_layer=flagged[0] if flagged else None,
        n_flagged_layers=len(flagged),
    )


def _exclusions(pair: ModelPair, means: Means) -> list[str]:
    """What was left out because a state was zero or not finite: which layers, which prompts."""
    notes = []
    left_out = [(str(site), tuple(np.flatnonzero(means[site].n_excluded))) for site in pair.sites]
    for prompts, sites in groupby(left_out, key=lambda item: item[1]):
        names = [name for name, _ in sites]
        if prompts:
            where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            notes.append(
                f"layer {where}: states that are zero or not finite were left out, in "
                f"{len(prompts)} of {means['embedding'].n_rows.size} prompts: "
                f"{listed([int(p) for p in prompts])}"
            )
    if notes:
        notes += _broken_weights(pair)
    return notes


def _why_no_data(pair: ModelPair) -> str:
    broken = "; ".join(_broken_weights(pair))
    if broken:
        return (
            f"No layer has one pair of states that are finite and not zero. {broken}. Fetch or train that "
            "model again."
        )
    return (
        "No layer has one pair of states that are finite and not zero, and yet all weights are finite: they "
        f"overflow in {pair.base.run_dtype}. Run with --dtype float32."
    )


def _broken_weights(pair: ModelPair) -> list[str]:
    notes = []
    for model in (pair.base, pair.finetuned):
        broken = [n for n, p in model.model.named_parameters() if not p.isfinite().all()]
        if broken:
            notes.append(f"{model.name}: {len(broken)} weights hold NaN or infinity, first {broken[0]}")
    return notes


def _settings(pair: ModelPair, facts: RunFacts) -> Settings:
    options = facts.options
    return Settings(
        position=str(facts.position),
        threshold=options.threshold,
        dtype=pair.base.run_dtype,
        device=str(facts.device),
        batch_tokens=facts.batch_tokens,
        chat_template=options.chat_template,
        memory="resident",
        align="ids",
        localize=False,
        noise_floor=False,
        fail_above=options.fail_above,
        expect=None,
        no_split=options.no_split,
        truncate=options.truncate,
        layers_path=options.layers_path,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )


def _model_info(model: LoadedModel, conventions: Conventions) -> ModelInfo:
    return ModelInfo(
        id=model.name,
        revision=model.revision,
        kind=model.kind,
        architecture=type(model.model).__name__,
        n_layers=conventions.n_layers,
        hidden_size=model.anatomy.hidden_size,
        stored_dtype=model.stored_dtype,
        run_dtype=model.run_dtype,
        attention=getattr(model.model.config, "_attn_implementation", None),
        adapter=model.adapter,
    )


def _environment(device: torch.device) -> Environment:
    on_gpu = device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        device_name=torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        n_threads=torch.get_num_threads(),
    )
