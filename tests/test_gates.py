"""A gate is met only by what was measured: whatever was left out fails it, with the count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import lazarus
from factories import perturbed, save_model, tiny_llama, word_tokenizer
from lazarus.cli.app import app
from lazarus.errors import GateNotMetError
from lazarus.metrics import Outcomes, compare_logits, match_outcomes

TEXTS = [f"t{i} t{i + 1} t{i + 2}" for i in range(1, 13)]
NAN, INF = float("nan"), float("inf")


def with_broken_row(model: Any, value: float) -> Any:
    """A copy whose embedding of t3 holds a number that is not finite: 3 of the 12 texts have it."""
    broken = copy.deepcopy(model)
    token = word_tokenizer().convert_tokens_to_ids("t3")
    with torch.no_grad():
        broken.model.embed_tokens.weight[token, 0] = value
    return broken


def compare(base: Any, finetuned: Any, **options: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(base, finetuned, TEXTS, tokenizer=word_tokenizer(), **options)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
def test_prompts_that_are_not_finite_fail_every_gate(
    value: float, sides: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny_llama()
    pair = [with_broken_row(model, value) if side in sides else model for side in (0, 1)]
    diff = compare(*pair)
    assert (diff.summary.n_prompts_left_out, diff.summary.n_outputs_left_out) == (3, 3)
    diff.save(tmp_path / "diff.json")
    for found in (diff, lazarus.ActivationDiff.load(tmp_path / "diff.json")):
        with pytest.raises(GateNotMetError, match="3 of 12 prompts have states that could not be compared"):
            found.check_gates(fail_above=2.0)
        with pytest.raises(GateNotMetError):
            found.check_gates(expect="identical")
        with pytest.raises(GateNotMetError):
            found.check_gates(expect="identical", only_compared=True)
    for gate in (["--fail-above", "2"], ["--expect", "identical"]):
        assert CliRunner().invoke(app, ["show", str(tmp_path / "diff.json"), *gate]).exit_code == 3


def test_states_that_are_not_finite_in_both_give_no_verdict() -> None:
    broken = with_broken_row(tiny_llama(), NAN)
    assert compare(broken, copy.deepcopy(broken)).summary.verdict is None
    other = copy.deepcopy(broken)
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    assert compare(broken, other).summary.verdict == "changed"


def test_logits_that_are_not_finite_fail_the_gates_though_all_states_are() -> None:
    model = tiny_llama()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[7] *= INF
    diff = compare(model, broken)
    assert diff.summary.n_prompts_left_out == 0
    assert diff.summary.n_outputs_left_out == len(TEXTS)
    with pytest.raises(GateNotMetError, match="12 of 12 prompts have logits that could not be compared"):
        diff.check_gates(fail_above=2.0)


def test_states_that_are_zero_in_both_are_the_same() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[word_tokenizer().convert_tokens_to_ids("t5")] = 1.0
    diff = compare(model, copy.deepcopy(model))
    assert diff.summary.n_prompts_left_out == 0
    diff.check_gates(expect="identical")


def test_the_gates_are_met_where_everything_was_measured() -> None:
    model = tiny_llama()
    diff = compare(model, perturbed(model, 0.01))
    diff.check_gates(fail_above=2.0, expect="changed")
    assert (diff.summary.n_prompts_left_out, diff.summary.n_outputs_left_out) == (0, 0)


# Two vocabularies.


def test_vocabularies_are_matched_by_their_tokens() -> None:
    assert match_outcomes({"a": 0, "b": 1}, {"a": 0, "b": 1}, (3, 3)) is None
    found = match_outcomes({"a": 0, "b": 1, "c": 2}, {"b": 0, "a": 1, "d": 2}, (4, 5))
    assert found is not None
    # Row 3 has no token in either model, and is the same row; row 4 is the fine-tuned model's alone.
    assert (found.base.tolist(), found.finetuned.tolist()) == ([0, 1, 3], [1, 0, 3])
    assert found.n_own == (1, 2)


def test_a_row_without_a_token_is_no_token_of_the_other() -> None:
    """A new token takes a row that base's padded LM head has, too: base cannot mean it."""
    found = match_outcomes({"a": 0}, {"a": 0, "<new>": 1}, (2, 2))
    assert found is not None
    assert (found.base.tolist(), found.n_own) == ([0], (1, 1))


def test_without_tokens_rows_are_matched_by_number() -> None:
    assert match_outcomes(None, None, (5, 5)) is None
    found = match_outcomes(None, None, (5, 7))
    assert found is not None
    assert (found.base.tolist(), found.n_own) == ([0, 1, 2, 3, 4], (0, 2))


def test_renumbered_tokens_are_the_same_outcomes() -> None:
    generator = torch.Generator().manual_seed(0)
    base, finetuned = torch.randn(2, 6, 40, generator=generator).unbind()
    order = torch.randperm(40, generator=generator)
    ids = {f"t{i}": i for i in range(40)}
    outcomes = match_outcomes(ids, {f"t{int(old)}": new for new, old in enumerate(order)}, (40, 40))
    found, expected = compare_logits(base, finetuned[:, order], outcomes), compare_logits(base, finetuned)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)


def test_own_tokens_are_one_outcome_and_own_first_choices() -> None:
    base = torch.tensor([[1.0, 2.0, 0.5]])
    finetuned = torch.tensor([[1.0, 2.0, 0.5, 9.0, 8.0]])
    outcomes = Outcomes(torch.arange(3), torch.arange(3), (3, 5))
    values = compare_logits(base, finetuned, outcomes).values[0]
    kl, reverse, js, agrees, rank = values[:5].tolist()
    p = base.double().softmax(-1)[0]
    q = finetuned.double().softmax(-1)[0, :3]
    assert kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12)
    assert (reverse, agrees, rank) == (INF, 0.0, 4.0)
    assert 0 < js < np.log(2)
    # The other way round, the fine-tuned model's first choice is a token that base has.
    back = compare_logits(finetuned, base, Outcomes(torch.arange(3), torch.arange(3), (5, 3))).values[0]
    assert back[0].item() == INF
    assert back[1].item() == pytest.approx(kl, rel=1e-12)
    assert (back[3].item(), back[4].item()) == (0.0, 3.0)


def test_two_vocabularies_with_nothing_in_common_have_one_outcome() -> None:
    none: Tensor = torch.empty(0, dtype=torch.long)
    values = compare_logits(torch.zeros(1, 3), torch.zeros(1, 2), Outcomes(none, none, (3, 2))).values[0]
    assert values[:5].tolist() == [0.0, 0.0, 0.0, 0.0, 4.0]


# --- whatever can be left out -------------------------------------------------------------------


def _eps(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


def _head(model: Any) -> None:
    model.lm_head.weight[7, 3] += 0.25


def _last_bit(model: Any) -> None:
    weight = model.model.layers[-1].mlp.down_proj.weight
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(INF))


def _unused_row(model: Any) -> None:
    model.model.embed_tokens.weight[299] *= 2  # of a token that no prompt has


LEFT_OUT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "digests": {"no_digests": True},
    "paths": {"anonymous": True},
    "tokens but the last": {"position": "last"},
    "tokens of single prompts": {"position": "all", "token_prompts": "none"},
    "memory": {"memory": "stream"},
    "all of it": {
        "no_digests": True,
        "anonymous": True,
        "position": "last",
        "memory": "stream",
        "token_prompts": "none",
    },
}


@pytest.mark.parametrize("change", [_eps, _head, _last_bit, _unused_row])
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_no_option_that_leaves_something_out_meets_a_gate(
    left_out: str, change: Callable[[Any], None], tmp_path: Path
) -> None:
    base = tiny_llama(tie_word_embeddings=False)
    other = copy.deepcopy(base)
    with torch.no_grad():
        change(other)
    folders = [
        save_model(tmp_path / name, model, word_tokenizer())
        for name, model in (("base", base), ("other", other))
    ]
    options = LEFT_OUT[left_out]
    if change in (_eps, _head):  # of the others no state has to know
        diff = lazarus.activation_diff(folders[0], folders[1], TEXTS, **options)
        with pytest.raises(GateNotMetError):
            diff.check_gates(expect="identical")
    of_weights = {name: value for name, value in options.items() if name in ("no_digests", "anonymous")}
    with pytest.raises(GateNotMetError):
        lazarus.weight_diff(folders[0], folders[1], **of_weights).check_gates(expect="identical")
