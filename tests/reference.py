"""The oracle: what the numbers must be, written without a line of lazarus.

One prompt at a time, unpadded, through the whole model with its head; states in NumPy float64; cosine
by the textbook's formula. Slow and plain on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

States = NDArray[np.float64]
Convention = Literal["standard", "shifted", "none"]


def cosine(base: States, finetuned: States) -> States:
    """Cosine similarity of each pair of rows, by b·f / (‖b‖‖f‖)."""
    dots: States = np.einsum("ij,ij->i", base, finetuned)
    lengths = np.sqrt(np.einsum("ij,ij->i", base, base) * np.einsum("ij,ij->i", finetuned, finetuned))
    cosines: States = dots / lengths
    return cosines


def recorded_states(model: PreTrainedModel, ids: Sequence[int]) -> tuple[States, ...]:
    """transformers' own `hidden_states` for one prompt alone: each [tokens, features]."""
    output = run_whole(model, ids, output_hidden_states=True)
    recorded = output.get("hidden_states") or output.get("encoder_hidden_states") or ()
    return tuple(as_rows(states, len(ids)) for states in recorded)


def block_outputs(model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Sequence[int]) -> list[States]:
    """Each block's output for one prompt alone, by a wrapper around its `forward`, not by a hook."""
    seen: list[States] = []

    def wrapped(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            states = returned if isinstance(returned, torch.Tensor) else returned[0]
            seen.append(as_rows(states, len(ids)))
            return returned

        return call

    originals = [block.forward for block in blocks]
    try:
        for block, forward in zip(blocks, originals, strict=True):
            block.forward = wrapped(forward)
        run_whole(model, ids)
    finally:
        for block in blocks:
            del block.forward
    return seen


def run_whole(model: PreTrainedModel, ids: Sequence[int], **options: Any) -> Any:
    """The whole model on one prompt without padding and without a mask."""
    input_ids = torch.tensor([list(ids)])
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = input_ids[:, :1]
    model.config.get_text_config().use_cache = False
    with torch.no_grad():
        return model(input_ids=input_ids, return_dict=True, **options)


def as_rows(states: torch.Tensor, n_tokens: int) -> States:
    """States of one prompt as [tokens, features], wherever the axis of the tokens is."""
    array = states.detach().double().numpy()
    axis = next(i for i, size in enumerate(array.shape[:-1]) if size == n_tokens)
    return np.moveaxis(array, axis, 0).reshape(n_tokens, -1)


def convention_of(recorded: Sequence[States], blocks: Sequence[States]) -> Convention:
    """How transformers' list relates to the blocks: entry i + 1, or entry i, is block i's output.

    The last block is left out: its entry has been through the final norm.
    """
    for name, offset in (("standard", 1), ("shifted", 0)):
        pairs = list(zip(recorded[offset:], blocks[:-1], strict=False))
        if (
            len(pairs) == len(blocks) - 1
            and pairs
            and all(r.shape == b.shape and np.allclose(r, b, rtol=1e-5, atol=1e-6) for r, b in pairs)
        ):
            return name  # type: ignore[return-value]
    return "none"


# What all prompts have in common, and the similarity of two models of any widths


def unrelated_similarity(prompts: Sequence[int], base: States, finetuned: States) -> float:
    """The mean cosine over all pairs of a base row and a fine-tuned row of different prompts, one by one."""
    cosines = [
        cosine(base[[i]], finetuned[[j]])[0]
        for i in range(len(base))
        for j in range(len(base))
        if prompts[i] != prompts[j]
    ]
    return float(np.mean(cosines))


def top_share(prompts: Sequence[int], base: States, finetuned: States, n_largest: int) -> float:
    """The share of the mean cosine in its largest dimensions; a prompt's rows are averaged first."""
    units = [rows / np.sqrt((rows**2).sum(1, keepdims=True)) for rows in (base, finetuned)]
    by_prompt = prompt_means(prompts, units[0] * units[1])
    by_dimension = sorted(by_prompt.mean(0), reverse=True)
    return float(sum(by_dimension[:n_largest]) / sum(by_dimension))


def static_share(prompts: Sequence[int], base: States, finetuned: States) -> float:
    """‖μ‖² = ‖δ̄‖² − Σ_p ‖δ̄_p − δ̄‖² / (P(P − 1)), over mean_p ‖δ̄_p‖²."""
    shifts = prompt_means(prompts, finetuned - base)
    n_prompts, mean = len(shifts), shifts.mean(0)
    scatter = ((shifts - mean) ** 2).sum()
    return float(((mean**2).sum() - scatter / (n_prompts * (n_prompts - 1))) / (shifts**2).sum(1).mean())


def prompt_means(prompts: Sequence[int], rows: States) -> States:
    """The mean of each prompt's rows, in the order of the prompts' numbers: [prompts, features]."""
    owners = np.array(prompts)
    return np.stack([rows[owners == prompt].mean(0) for prompt in sorted(set(prompts))])


def unbiased_cka(x: States, y: States) -> float:
    """CKA with the unbiased HSIC of Song et al. 2012, eq. 5: Gram matrices of raw rows, diagonals zeroed."""
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)

    def hsic(one: States, other: States) -> float:
        n = len(one)
        trace, totals = np.trace(one @ other), one.sum() * other.sum()
        crossed = (one @ other).sum()
        return float(trace + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * crossed) / (n * (n - 3))

    return hsic(k, m) / float(np.sqrt(hsic(k, k) * hsic(m, m)))


def biased_cka(x: States, y: States) -> float:
    """Linear CKA as in Kornblith et al. 2019: ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) of centred X and Y."""
    x, y = x - x.mean(0), y - y.mean(0)
    squared = ((x.T @ y) ** 2).sum()
    return float(squared / np.sqrt(((x.T @ x) ** 2).sum() * ((y.T @ y) ** 2).sum()))


# Next-token distributions


def output_metrics(base: States, finetuned: States) -> dict[str, States]:
    """Each metric of two rows of logits, token by token."""
    rows = [_output_of_one(b, f) for b, f in zip(base, finetuned, strict=True)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _output_of_one(base: States, finetuned: States) -> dict[str, float]:
    log_p, log_q = _log_softmax(base), _log_softmax(finetuned)
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(divide="ignore"):
        log_mean = np.log((p + q) / 2)
    first = int(np.argmax(finetuned))
    both = np.isfinite(base) & np.isfinite(finetuned)
    length = np.sqrt((base[both] ** 2).sum())
    return {
        "kl_base_finetuned": _kl(log_p, log_q),
        "kl_finetuned_base": _kl(log_q, log_p),
        "js": (_kl(log_p, log_mean) + _kl(log_q, log_mean)) / 2,
        "top1_agreement": float(np.argmax(base) == first),
        "base_rank_of_finetuned_top1": 1.0 + sum(value > base[first] for value in base),
        "logits_relative_l2": float(np.sqrt(((finetuned - base)[both] ** 2).sum()) / length),
    }


def _log_softmax(logits: States) -> States:
    shifted = logits - logits.max()
    logs: States = shifted - np.log(np.exp(shifted).sum())
    return logs


def _kl(log_p: States, log_q: States) -> float:
    pairs = [(a, b) for a, b in zip(log_p, log_q, strict=True) if np.exp(a) > 0]
    return float(sum(np.exp(a) * (a - b) for a, b in pairs))
