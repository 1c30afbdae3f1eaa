"""The mean difference of all prompts, read as tokens through each model's own LM head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lazarus.activation.accumulation import Accumulation
from lazarus.engine import NO_HEAD, Conventions, Head, ModelPair, head_reads_blocks
from lazarus.errors import UnsupportedModelError
from lazarus.messages import option
from lazarus.models import LoadedModel
from lazarus.options import Options, readout_layers
from lazarus.reading import Reading
from lazarus.results import Readout, ReadoutToken, finite_or_none
from lazarus.tokens import token_text

N_TOKENS = 10


def readable_layers(options: Options, pair: ModelPair, reading: Reading) -> list[int]:
    """Return the layers whose mean difference is read through the heads; none unless that was asked for.

    Raises:
        UsageError: the models have no such layer.
        UnsupportedModelError: a head cannot be run by itself, or there is no difference to read.
    """
    if options.readout is None:
        return []
    for model, conventions, ids, pad_id in zip(
        (pair.base, pair.finetuned),
        (pair.base_conventions, pair.finetuned_conventions),
        reading.samples,
        reading.pad_ids,
        strict=True,
    ):
        if conventions.head_reads is None:
            why = conventions.why_no_head
            why = f"{model.name} has {NO_HEAD}" if why == NO_HEAD else why
            raise _refusal(options, why)
        reads = head_reads_blocks(model, ids, pad_id)
        if reads is None:
            raise _refusal(
                options,
                f"the logits of {model.name} are not finite, so it is not known whether its head reads a "
                "block's states",
            )
        if not reads:
            raise _refusal(
                options,
                f"{model.name} makes more than a norm of what leaves its last block, so a block's states "
                "cannot be read through its head",
            )
    if not pair.same_width:
        n_features = f"{pair.widths[0]} and {pair.widths[1]}"
        raise _refusal(options, f"states of {n_features} features have no difference to read")
    return readout_layers(options.readout, pair.base_conventions.n_layers)


def _refusal(options: Options, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{option('readout', options.readout)}: {reason}. Leave {option('readout')} out.",
        option="readout",
    )


def read_differences(
    pair: ModelPair, seen: Accumulation, layers: Sequence[int], tokenizers: tuple[Any, Any]
) -> list[Readout]:
    """The tokens that the mean difference δ̄ promotes and suppresses, at each of the chosen layers.

    The score of a token is its logit for δ̄ less its logit for no difference at all, both through the
    final norm and the head of one model (logit lens, nostalgebraist 2020; on mean differences: Minder et
    al. 2025, arXiv 2510.13900). A norm takes the length away, so scores compare tokens within a layer only.
    """
    found = [seen.sites[layer].directions.mean_difference() for layer in layers]
    # A layer without one finite pair of states has no difference: its accumulator has no width yet.
    nothing = np.full(pair.widths[0], np.nan)
    differences = [nothing if difference.shape != nothing.shape else difference for difference in found]
    models = ((pair.base, pair.base_conventions), (pair.finetuned, pair.finetuned_conventions))
    read = [
        [_extremes(scores, tokenizer) for scores in _scores(model, conventions, differences)]
        for (model, conventions), tokenizer in zip(models, tokenizers, strict=True)
    ]
    return [
        Readout(
            layer=layer,
            base_promoted=base[0],
            base_suppressed=base[1],
            finetuned_promoted=finetuned[0],
            finetuned_suppressed=finetuned[1],
            static_share=finite_or_none(seen.sites[layer].directions.static_share()),
        )
        for layer, base, finetuned in zip(layers, *read, strict=True)
    ]


def _scores(
    model: LoadedModel, conventions: Conventions, differences: Sequence[NDArray[Any]]
) -> Float[Tensor, "layers vocabulary"]:
    """The logits of each difference less those of none."""
    assert conventions.head_reads is not None
    head = Head(model, conventions.head_reads)
    vectors = torch.stack([torch.from_numpy(d) for d in differences])
    # Scaled to the size of a usual state: a small vector would vanish beside the epsilon of a norm.
    sizes = vectors.square().mean(-1, keepdim=True).sqrt()
    vectors = torch.where(sizes > 0, vectors / sizes, vectors)
    # The first row is no difference at all: what the head makes of it is taken off the others.
    vectors = torch.cat([torch.zeros_like(vectors[:1]), vectors]).to(model.device)
    logits = head.read(vectors.float()).double().cpu()
    return logits[1:] - logits[:1]


def _extremes(scores: Tensor, tokenizer: Any) -> tuple[list[ReadoutToken], list[ReadoutToken]]:
    """The tokens with the largest and the smallest scores; none where no token stands out."""
    if not scores.isfinite().all() or scores.max() == scores.min():
        return [], []
    n_tokens = min(N_TOKENS, len(scores))
    promoted, suppressed = scores.topk(n_tokens), (-scores).topk(n_tokens)
    return _tokens(promoted.indices, scores, tokenizer), _tokens(suppressed.indices, scores, tokenizer)


def _tokens(ids: Tensor, scores: Tensor, tokenizer: Any) -> list[ReadoutToken]:
    return [
        ReadoutToken(token=token_text(tokenizer, i), token_id=i, score=float(scores[i])) for i in ids.tolist()
    ]
