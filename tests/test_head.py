"""A model's own head: its logits, what fine-tuning does to them, and the mean difference read through it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

import lazarus
from architectures import CAUSAL, REFUSED, UNBUILDABLE, WITHOUT_HEAD, WITHOUT_READOUT, build, swept
from factories import let_head_see_tokens, perturbed, tiny_llama, word_tokenizer
from lazarus.engine.head import Head, head_alone, reads_blocks, run_with_head
from lazarus.engine.recorder import Recorder
from lazarus.errors import UnsupportedModelError, UsageError
from lazarus.models import dissect, wrap_model
from reference import output_metrics, run_whole

IDS = [[5, 17, 80, 3, 41], [9, 33], [12, 77, 31], [64, 27, 50, 23, 8, 91, 36, 70, 19]]
TEXTS = [" ".join(f"t{i}" for i in ids) for ids in IDS]
WITH_HEAD = [name for name in CAUSAL if name not in {*UNBUILDABLE, *REFUSED, *WITHOUT_HEAD}]
KLS = ("kl_base_finetuned", "kl_finetuned_base", "js")
Floats = NDArray[np.float64]


def compare(base: PreTrainedModel, finetuned: PreTrainedModel, **options: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(
        base, finetuned, TEXTS, tokenizer=word_tokenizer(), **{"no_noise_floor": True, **options}
    )


@pytest.mark.parametrize("name", swept(WITH_HEAD))
def test_the_head_by_itself_gives_the_logits_of_the_whole_model(name: str) -> None:
    """From the states after the final norm, and, unless that is refused, from those of the last block."""
    model = build(name)
    wrapped = wrap_model(model, name)
    ids = torch.tensor([IDS[3]])
    recorder, batch = Recorder(wrapped), (ids, torch.ones_like(ids))
    whole = run_with_head(recorder, *batch)
    assert whole is not None
    found, reads = head_alone(recorder, batch, whole).reads, reads_blocks(recorder, batch, whole)
    assert found is not None
    assert reads == (name not in WITHOUT_READOUT)
    expected, final, last_block = of_whole(model, IDS[3])
    head = Head(wrapped, found)
    within(head.logits(final), expected)
    if reads:
        within(head.read(last_block), expected)


def within(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def of_whole(model: PreTrainedModel, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole model's logits, and the states after its final norm and its last block, [tokens, ...]."""
    anatomy = dissect(model)
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[name] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    handles = [
        anatomy.stack.register_forward_hook(keep("final")),
        anatomy.blocks[-1].register_forward_hook(keep("block")),
    ]
    logits = run_whole(model, ids).logits[0]
    for handle in handles:
        handle.remove()
    return logits, seen["final"][0], seen["block"][0]


@pytest.mark.parametrize("name", WITHOUT_READOUT)
def test_a_model_whose_blocks_cannot_be_read_is_refused(name: str) -> None:
    model = build(name)
    with pytest.raises(UnsupportedModelError, match=r"`readout=.auto.`: .*Leave `readout` out\."):
        compare(model, model, readout="auto")
    diff = compare(model, model)
    assert (diff.record.output is None) == (name in WITHOUT_HEAD)


def test_an_encoder_has_no_output_and_no_note_of_one() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    model = BertForMaskedLM(BertConfig(vocab_size=100, num_attention_heads=4, **sizes)).eval()
    diff = compare(model, perturbed(model))
    assert diff.record.output is None
    assert "output-not-measured" not in diff.note_codes
    assert "not compared: LM head (cls): differs" in diff.notes


def test_a_head_that_cannot_be_run_by_itself_is_noted() -> None:
    """A head that adds what it sees in the token ids gives other logits without them."""
    model = tiny_llama()
    let_head_see_tokens(model)
    diff = compare(model, model)
    assert diff.record.output is None
    assert any("no next-token head that can be run by itself" in note for note in diff.notes)
    with pytest.raises(UnsupportedModelError, match="no next-token head that can be run by itself"):
        compare(model, model, readout="auto")


# What the fine-tuning does to the output, against whole models run on one prompt at a time, unpadded.


def whole_logits(model: PreTrainedModel, ids: Sequence[int]) -> Floats:
    logits: Floats = run_whole(model, ids).logits[0].double().numpy()
    return logits


CAPPED_OR_SCALED: dict[str, dict[str, float]] = {
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 4.0},
}


def capped_or_scaled(name: str) -> PreTrainedModel:
    model = build(name)
    for setting, value in CAPPED_OR_SCALED[name].items():
        assert hasattr(model.config, setting)
        setattr(model.config, setting, value)
        if hasattr(model, setting):
            setattr(model, setting, value)
    return model


@pytest.mark.parametrize("position", ["last", "mean", "all", 0])
@pytest.mark.parametrize("name", ["llama", *CAPPED_OR_SCALED])
def test_the_output_equals_the_oracle(name: str, position: str | int) -> None:
    """Whatever is done to the logits; `mean` reads the last token, since no head reads a mean of states."""
    base = capped_or_scaled(name) if name in CAPPED_OR_SCALED else build(name)
    finetuned = perturbed(base, 0.3)
    diff = compare(base, finetuned, position=position, batch_tokens=20)
    rows = []
    for ids in IDS:
        part = slice(1, None) if position == "all" else slice(0, 1) if position == 0 else slice(-1, None)
        found = output_metrics(whole_logits(base, ids)[part], whole_logits(finetuned, ids)[part])
        rows.append({metric: values.mean() for metric, values in found.items()})
    output = diff.record.output
    assert output is not None
    for metric in rows[0]:
        expected = np.mean([row[metric] for row in rows])
        assert getattr(output, metric) == pytest.approx(expected, rel=1e-4), metric
    assert (output.js or 0.0) > 1e-5


def test_the_logits_of_these_are_capped_or_scaled() -> None:
    """Otherwise the test above would prove nothing of it."""
    for name in CAPPED_OR_SCALED:
        model: Any = capped_or_scaled(name)
        logits, final, _ = of_whole(model, IDS[0])
        assert not torch.allclose(logits, model.lm_head(final), rtol=0.1)


def test_a_changed_head_alone_is_a_change() -> None:
    base, finetuned = tiny_llama(), tiny_llama()
    with torch.no_grad():
        finetuned.lm_head.weight.mul_(1.01)
    diff = compare(base, finetuned, no_noise_floor=False)
    assert [layer.divergence for layer in diff.layers] == [0.0] * 4
    assert [site.relative_l2 for site in diff.sites] == [0.0, 0.0]
    assert diff.record.output is not None
    assert diff.record.output.logits_relative_l2 == pytest.approx(0.01, rel=1e-3)
    assert diff.summary.verdict == "changed"


def test_tokens_that_one_head_alone_has_are_one_more_outcome() -> None:
    base = tiny_llama()
    finetuned = perturbed(base)
    finetuned.resize_token_embeddings(308, mean_resizing=False)

    def outcomes(model: Any, ids: list[int]) -> Floats:
        logits = whole_logits(model, ids)[-1:].astype(np.float64)
        with np.errstate(divide="ignore"):
            other = np.log(np.exp(logits[:, 300:]).sum(-1, keepdims=True))
        return np.concatenate([logits[:, :300], other], axis=-1)

    for one, other, infinite in (
        (base, finetuned, "kl_finetuned_base"),
        (finetuned, base, "kl_base_finetuned"),
    ):
        diff = compare(one, other)
        found = diff.record.output
        assert found is not None
        rows = [output_metrics(outcomes(one, ids), outcomes(other, ids)) for ids in IDS]
        for metric in {*KLS} - {infinite}:
            expected = np.mean([row[metric] for row in rows])
            assert getattr(found, metric) == pytest.approx(expected, rel=1e-4)
        assert getattr(found, infinite) is None
        assert any("300 are in both" in note for note in diff.notes)
        assert any("is infinite, and null in JSON" in note for note in diff.notes)


@pytest.mark.parametrize(("position", "n_rows"), [("last", len(IDS)), ("all", sum(map(len, IDS)) - len(IDS))])
def test_the_head_runs_on_the_compared_rows_alone(position: str, n_rows: int) -> None:
    base = tiny_llama()
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        finetuned.lm_head.weight.mul_(2)
    seen: list[int] = []
    handle = rows_through_head(finetuned, seen)  # of a pair of one design only base is learnt
    compare(base, finetuned, position=position)
    handle.remove()
    assert sum(seen) == n_rows


def rows_through_head(model: Any, seen: list[int]) -> Any:
    """Counts the rows that a model's head is given."""

    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].shape[:-1].numel())

    return model.lm_head.register_forward_pre_hook(hook)


# The readout.


def planted(token: int, amount: float = 20.0) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base, and a fine-tune whose last block adds the unembedding row of one token to every state."""
    base = tiny_llama()
    finetuned = copy.deepcopy(base)
    direction = finetuned.lm_head.weight[token].detach() / finetuned.lm_head.weight[token].norm()
    block = finetuned.model.layers[-1]
    plain = block.forward

    def shifting(*args: Any, **kwargs: Any) -> torch.Tensor:
        states: torch.Tensor = plain(*args, **kwargs) + amount * direction
        return states

    block.forward = shifting
    return base, finetuned


@pytest.mark.parametrize("token", [7, 42])
def test_a_planted_token_is_read_first(token: int) -> None:
    base, finetuned = planted(token)
    diff = compare(base, finetuned, readout="all")
    assert diff.record.readout is not None
    readout = diff.record.readout[-1]
    for promoted in (readout.finetuned_promoted, readout.base_promoted):
        assert promoted[0].token_id == token
        assert promoted[0].token == f"t{token}"
        assert [t.score for t in promoted] == sorted((t.score for t in promoted), reverse=True)
    assert token not in [t.token_id for t in readout.finetuned_suppressed]
    assert readout.static_share == pytest.approx(1.0, abs=1e-4)
    assert f"the mean difference at layer 3 promotes 't{token}'" in str(diff)
    assert diff.record.readout[0].finetuned_promoted == []  # nothing differs before the last block


def test_the_scores_are_those_of_the_norm_and_the_head() -> None:
    """By hand: lm_head(norm(δ̄)), where Llama's norm and head give 0 for no difference."""
    base = tiny_llama()
    finetuned: Any = perturbed(base, 0.3)
    diff = compare(base, finetuned, readout="1", position="last")
    states = []
    for model in (base, finetuned):
        kept: list[torch.Tensor] = []
        handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
        for ids in IDS:
            run_whole(model, ids)
        handle.remove()
        states.append(torch.stack([out[0, -1] for out in kept]).double())
    difference = (states[1] - states[0]).mean(0).float()
    assert diff.record.readout is not None
    for model, promoted in (
        (base, diff.record.readout[0].base_promoted),
        (finetuned, diff.record.readout[0].finetuned_promoted),
    ):
        with torch.no_grad():
            scores = model.lm_head(model.model.norm(difference))
        assert [t.token_id for t in promoted] == scores.topk(10).indices.tolist()
        np.testing.assert_allclose([t.score for t in promoted], scores.topk(10).values, rtol=1e-4)


@pytest.mark.parametrize(
    ("readout", "layers"), [("auto", [1, 2, 3]), ("all", [0, 1, 2, 3]), ("1,-1", [1, 3]), ("-4", [0])]
)
def test_the_layers_that_are_read(readout: str, layers: list[int]) -> None:
    diff = compare(tiny_llama(), perturbed(tiny_llama()), readout=readout)
    assert diff.record.readout is not None
    assert [found.layer for found in diff.record.readout] == layers
    assert compare(tiny_llama(), tiny_llama()).record.readout is None


@pytest.mark.parametrize(("readout", "layer"), [("99", 99), ("1,4", 4), ("-5", -5)])
def test_a_layer_that_is_absent_is_named(readout: str, layer: int) -> None:
    with pytest.raises(UsageError, match=f"`readout=.{readout}.`: there is no layer {layer} in models of 4"):
        compare(tiny_llama(), tiny_llama(), readout=readout)
