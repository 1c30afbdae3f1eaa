"""Diff Mining against brute force: every prompt, every position and every token by itself."""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus.metrics import DiffMining, match_outcomes
from lazarus.results import Mined
from reference import run_whole

INF = math.inf
N_TOKENS = 300
TEXTS = [" ".join(f"t{3 + (7 * i + k * k) % 90}" for k in range(2 + i % 7)) for i in range(14)]
REPEATED = [*TEXTS, TEXTS[3], TEXTS[3], TEXTS[6]]

Frequencies = dict[int, float]


def compare(models: Sequence[PreTrainedModel], texts: Sequence[str] = TEXTS, **options: Any) -> Any:
    base, finetuned = models
    asked: Any = {"readout": "all", **options}
    return lazarus.activation_diff(base, finetuned, list(texts), tokenizer=word_tokenizer(), **asked)


def mined(*arguments: Any, **options: Any) -> Mined:
    found: Mined | None = compare(*arguments, **options).record.mined
    assert found is not None
    return found


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    base = tiny_llama()
    return base, perturbed(base)


# The oracle: every prompt by itself, every position by itself, every token by itself.


def logits_of(model: PreTrainedModel, text: str, position: str) -> NDArray[np.float64]:
    """Return the logits at the compared positions of a prompt, [positions, tokens]."""
    logits = run_whole(model, [int(word[1:]) for word in text.split()]).logits[0].double().numpy()
    return np.asarray(logits[1:] if position == "all" and len(logits) > 1 else logits[-1:])


def of_position(difference: NDArray[np.float64], k: int) -> list[int]:
    """Return the tokens that fewer than k others equal or surpass."""
    return [token for token, value in enumerate(difference) if (difference >= value).sum() <= k]


def expected(
    models: Sequence[PreTrainedModel], texts: Sequence[str], position: str, k: int = N_TOKENS // 10
) -> tuple[Frequencies, Frequencies]:
    """Return how often each token is promoted, and suppressed: a mean over prompts of their own shares."""
    found: tuple[Frequencies, Frequencies] = (defaultdict(float), defaultdict(float))
    for text in texts:
        base, finetuned = (logits_of(model, text, position) for model in models)
        for sign, side in zip((1, -1), found, strict=True):
            for row in sign * (finetuned - base):
                for token in of_position(row, k):
                    side[token] += 1 / len(base) / len(texts)
    return found


def assert_are(found: Sequence[Any], frequencies: Frequencies) -> None:
    """The first twenty: of equal frequencies the lower id first."""
    first = sorted(frequencies, key=lambda token: (-round(frequencies[token], 9), token))[:20]
    assert [each.token_id for each in found] == first
    np.testing.assert_allclose([each.frequency for each in found], [frequencies[i] for i in first], rtol=1e-9)


@pytest.mark.parametrize("position", ["last", "mean", "all"])
@pytest.mark.parametrize("texts", [TEXTS, REPEATED], ids=["distinct", "repeated"])
def test_the_tokens_are_those_of_brute_force(models: Any, texts: list[str], position: str) -> None:
    found = mined(models, texts, position=position)
    promoted, suppressed = expected(models, texts, position)
    assert_are(found.promoted, promoted)
    assert_are(found.suppressed, suppressed)
    n_positions = sum(len(logits_of(models[0], text, position)) for text in texts)
    assert (found.k, found.n_tokens, found.n_positions) == (30, N_TOKENS, n_positions)
    named = {token.token_id: token.token for token in (*found.promoted, *found.suppressed)}
    # The model has more logits than there are words.
    assert {i: name for i, name in named.items() if i < 100} == {i: f"t{i}" for i in named if i < 100}


def test_a_long_prompt_weighs_as_much_as_a_short_one(models: Any) -> None:
    """Its positions are averaged first: the frequencies of two prompts are the mean of each one's own."""
    long, short = " ".join(f"t{3 + i}" for i in range(40)), "t90 t7"
    both, _ = expected(models, [long, short], "all")
    alone = [expected(models, [text], "all")[0] for text in (long, short)]
    assert both == pytest.approx({i: (alone[0].get(i, 0) + alone[1].get(i, 0)) / 2 for i in both})
    assert_are(mined(models, [long, short], position="all").promoted, both)


@pytest.mark.parametrize("options", [{"batch_tokens": 8}, {"batch_tokens": 4096}, {"work_dir": "work"}])
def test_batches_and_shards_change_nothing(
    models: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = mined(models, REPEATED, position="all")
    assert mined(models, REPEATED, position="all", **options) == plain


def test_logits_that_come_in_parts_change_nothing(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mined(models, REPEATED, position="all")
    # Two rows at once: nearly every prompt is parted.
    monkeypatch.setattr("lazarus.engine.runner.MOST_LOGITS", 2 * N_TOKENS)
    monkeypatch.setattr("lazarus.metrics.output.LOGITS_AT_ONCE", N_TOKENS)
    assert mined(models, REPEATED, position="all") == plain


def test_streamed_models_give_the_same(tmp_path: Path) -> None:
    base = tiny_llama()
    ours = save_model(tmp_path / "base", base, tiny_tokenizer())
    theirs = save_model(tmp_path / "finetuned", perturbed(base), tiny_tokenizer())
    texts = ["Hello", "What is AI?"]
    one, other = (
        lazarus.activation_diff(
            ours, theirs, texts, position="all", readout="all", memory=memory
        ).record.mined
        for memory in ("resident", "stream")
    )
    assert one is not None
    assert one == other


# Single positions.


def counted(base: Tensor, finetuned: Tensor, valid: Tensor | None = None, **options: Any) -> DiffMining:
    found = DiffMining(options.pop("others", {}), **options)
    prompts = torch.arange(len(base))
    found.update(
        prompts, base, finetuned, torch.ones(len(base), dtype=torch.bool) if valid is None else valid
    )
    return found


def logits(seed: int, n_rows: int = 6, n_tokens: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base, noise = torch.randn(2, n_rows, n_tokens, generator=generator)
    return base, base + noise


def test_of_the_same_logits_and_of_a_constant_nothing_is_counted() -> None:
    base, _ = logits(0)
    for constant in (0.0, 3.0):
        # Whole numbers, so that the sum is exact.
        assert not counted(base.round(), base.round() + constant).frequencies().any()
    half = counted(torch.cat([base, base]), torch.cat([base, base.flip(-1)]))
    # The positions at which nothing differs count all the same.
    assert half.n_positions == 12
    assert half.frequencies()[0].sum() == pytest.approx(half.k / 2)


def test_of_tokens_that_tie_at_the_last_place_none_is_counted() -> None:
    base = torch.zeros(1, 50)
    finetuned = base.clone()
    finetuned[0, [3, 4]] = 2.0
    finetuned[0, [7, 8, 9, 10]] = 1.0  # k is 5: two of these four would be chance
    finetuned[0, 20] = -1.0
    promoted, suppressed = counted(base, finetuned).frequencies()
    assert promoted.nonzero()[0].tolist() == [3, 4]
    assert suppressed.nonzero()[0].tolist() == [20]


def test_a_token_that_neither_can_give_is_none_and_one_that_one_can_give_is_the_first() -> None:
    base, finetuned = logits(1, n_rows=1)
    base[0, [0, 1]], finetuned[0, [0, 2]] = -INF, -INF
    promoted, suppressed = counted(base, finetuned).frequencies()
    rest = [i for i in range(50) if i > 2]
    order = [rest[i] for i in (finetuned - base)[0, rest].argsort(descending=True).tolist()]
    assert set(promoted.nonzero()[0]) == {1, *order[:4]}
    assert set(suppressed.nonzero()[0]) == {2, *order[-4:]}
    nothing = torch.full((1, 50), -INF)
    nothing[0, 5:8] = 0.0  # fewer than k that can come at all, and the same in both
    assert not counted(nothing, nothing).frequencies().any()


def test_rows_that_are_not_valid_are_left_out() -> None:
    base, finetuned = logits(2)
    broken = base.clone()
    broken[2, 7] = torch.nan
    kept = torch.arange(6) != 2
    found, without = counted(broken, finetuned, kept), counted(base[kept], finetuned[kept])
    assert found.n_prompts == found.n_positions == 5
    np.testing.assert_array_equal(found.frequencies(), without.frequencies())


def test_vocabularies_without_a_common_token_have_nothing_to_mine() -> None:
    base, finetuned = logits(5)
    outcomes = match_outcomes({f"a{i}": i for i in range(50)}, {f"b{i}": i for i in range(50)}, (50, 50))
    found = counted(base, finetuned, outcomes=outcomes)
    assert (found.n_tokens, found.n_positions) == (0, 6)
    assert found.frequencies().shape == (2, 0)


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
def test_tiny_vocabularies(n_tokens: int) -> None:
    base, finetuned = logits(3, n_tokens=n_tokens)
    found = counted(base, finetuned)
    assert found.k == 1
    total = 0 if n_tokens == 1 else 1  # of one token alone none is raised above another
    assert found.frequencies().sum(axis=1) == pytest.approx([total, total])


@given(seed=st.integers(0, 1000), constant=st.integers(-50, 50), split=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_what_must_not_matter(seed: int, constant: int, split: int) -> None:
    """A constant on all logits, the order of the tokens, who has seen what; and the sign is a swap."""
    base, finetuned = (part.double() for part in logits(seed))
    plain = counted(base, finetuned).frequencies()
    np.testing.assert_array_equal(counted(base, finetuned + constant).frequencies(), plain)
    np.testing.assert_array_equal(counted(finetuned, base).frequencies(), plain[::-1])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_array_equal(counted(base[:, order], finetuned[:, order]).frequencies(), plain[:, order])
    one, other = counted(base[:split], finetuned[:split]), counted(base[split:], finetuned[split:])
    joined = DiffMining({})
    for part in (other, one):
        joined.add(part.state())
    np.testing.assert_array_equal(joined.frequencies(), plain)


# Vocabularies that differ.


def test_common_tokens_are_matched_and_the_others_left_out() -> None:
    base, finetuned = logits(4, n_tokens=40)
    # Fine-tuned has its tokens in another order, lacks two of base's, and has one of its own.
    order = [i for i in range(39, -1, -1) if i not in (5, 6)]
    ours = {f"t{i}": i for i in range(40)}
    theirs = {f"t{i}": place for place, i in enumerate(order)} | {"own": 38}
    moved = torch.cat([finetuned[:, order], torch.full((6, 1), 99.0)], dim=1)
    outcomes = match_outcomes(ours, theirs, (40, 39))
    assert outcomes is not None
    found = counted(base, moved, outcomes=outcomes)
    common = outcomes.base.tolist()
    assert sorted(common) == [i for i in range(40) if i not in (5, 6)]
    np.testing.assert_array_equal(
        found.frequencies(), counted(base[:, common], finetuned[:, common]).frequencies()
    )


def test_a_resized_vocabulary_is_mined_where_both_have_tokens(tmp_path: Path) -> None:
    """The rows that the fine-tune has more of do not change what is mined of the others."""
    base = tiny_llama()
    finetuned = perturbed(base)
    larger = copy.deepcopy(finetuned)
    larger.resize_token_embeddings(310, mean_resizing=False)
    plain, resized = mined((base, finetuned), position="all"), mined((base, larger), position="all")
    assert resized == plain
    assert resized.n_tokens == N_TOKENS


# What is told, and where nothing is.


@pytest.mark.parametrize("finetuned", ["same", "noise"])
def test_within_the_noise_nothing_is_mined_and_a_note_says_so(finetuned: str) -> None:
    base = tiny_llama()
    other = copy.deepcopy(base)
    if finetuned == "noise":
        with torch.no_grad():
            other.lm_head.weight.mul_(1 + 2e-8).add_(1e-9)
    diff = compare((base, other))
    assert diff.summary.verdict in ("identical", "within_noise")
    assert diff.record.mined is None
    assert "the logits differ by no more than the noise" in notes(diff)[0]
    assert "most often promoted" not in str(diff)


def notes(diff: Any) -> list[str]:
    pairs = zip(diff.note_codes, diff.notes, strict=True)
    return [text for code, text in pairs if code == "nothing-mined"]


def test_with_texts_read_apart_nothing_is_mined(models: Any) -> None:
    diff = compare(models, align="text")
    assert diff.record.mined is None
    assert notes(diff) == ["no tokens were mined: there are no logits of both models to compare"]
    assert diff.record.readout


def test_shards_without_a_readout_are_not_taken_for_ones_in_which_nothing_changed(
    models: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    assert compare(models, readout=None, batch_tokens=8, work_dir=str(folder)).record.mined is None
    without = compare(models, batch_tokens=8, work_dir=str(folder))
    assert without.record.mined is None
    assert "shards in the folder were measured without a readout" in notes(without)[0]
    assert without.record.readout == compare(models, batch_tokens=8).record.readout
    # One shard more that was measured with it is still not all of them.
    sorted(folder.glob("shard-*.npz"))[0].unlink()
    assert compare(models, batch_tokens=8, work_dir=str(folder)).record.mined is None


def test_it_is_only_measured_with_a_readout(models: Any) -> None:
    diff = compare(models, readout=None)
    assert diff.record.mined is None
    assert notes(diff) == []


def test_the_summary_names_the_first_tokens(models: Any) -> None:
    diff = compare(models, position="all")
    first = diff.record.mined.promoted[0]
    assert f"Readout: most often promoted are '{first.token}' {first.frequency:.0%}" in str(diff)
    assert "; the mean difference at layer 3 promotes " in str(diff)


def test_a_result_of_an_older_version_has_none(tmp_path: Path, models: Any) -> None:
    diff = compare(models)
    diff.save(tmp_path / "new.json")
    older = json.loads((tmp_path / "new.json").read_bytes())
    assert older.pop("mined")["k"] == 30
    (tmp_path / "old.json").write_text(json.dumps(older), encoding="utf-8")
    loaded = lazarus.ActivationDiff.load(tmp_path / "old.json")
    assert loaded.record == msgspec.structs.replace(diff.record, mined=None)
    assert "Readout: the mean difference at layer 3 promotes" in str(loaded)
