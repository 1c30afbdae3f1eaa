"""Scores of labels, rewards and embeddings: those of each prompt alone, and how far apart two models' are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from scipy.stats import binomtest, spearmanr
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from factories import notes_of, save_model, word_tokenizer
from layouts import edit_json, edit_weights
from lazarus import ActivationDiff, activation_diff, load_result
from lazarus.errors import GateNotMetError, UsageError
from lazarus.results import Output, Scores
from lazarus.statistics import rank_correlation, share_interval, similarity_correlation, size_interval

Floats = NDArray[np.float64]

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GPT2_SIZES = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
DISTIL_SIZES = {
    "vocab_size": 100,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "initializer_range": 0.2,
}
XLNET_SIZES = {
    "vocab_size": 100,
    "d_model": 32,
    "n_layer": 2,
    "n_head": 4,
    "d_inner": 48,
    "initializer_range": 0.2,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "reward": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)),
    # With the id of its padding not known it refuses two prompts at once.
    "llama without padding": lambda: LlamaForSequenceClassification(
        LlamaConfig(**{**SIZES, "pad_token_id": None}, num_labels=3)
    ),
    "qwen2": lambda: Qwen2ForSequenceClassification(
        Qwen2Config(**SIZES, num_key_value_heads=4, num_labels=2)
    ),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(**GPT2_SIZES, num_labels=3, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
    "albert": lambda: AlbertForSequenceClassification(
        AlbertConfig(**SIZES, embedding_size=16, num_labels=2, **SPECIAL)
    ),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=2)),
    "modernbert, mean": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**SIZES, num_labels=2, classifier_pooling="mean", **SPECIAL)
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL_SIZES, num_labels=2)),
    "xlnet": lambda: XLNetForSequenceClassification(XLNetConfig(**XLNET_SIZES, num_labels=2)),
}
IDS = [[5, 17, 80, 3, 41], [9, 12], [77, 31, 60], [8], [44, 45, 46, 47, 48, 49, 50], [90, 2, 18, 7], [11, 71]]
PROMPTS = [" ".join(f"t{i}" for i in ids) for ids in IDS]


def made(name: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def changed(model: PreTrainedModel, part: str = "", by: float = 0.2) -> PreTrainedModel:
    """A copy with noise on the parameters whose name has `part` in it, or on those outside the stack."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    inside = {id(p) for p in other.base_model.parameters()}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if part in name if part else id(parameter) not in inside:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return other


def compare(base: Any, finetuned: Any, prompts: Sequence[str] = PROMPTS, **options: Any) -> ActivationDiff:
    options = {"tokenizer": word_tokenizer(), **options}
    return activation_diff(base, finetuned, list(prompts), **options)


def output_of(diff: ActivationDiff) -> tuple[Output, Scores]:
    output = diff.record.output
    assert output is not None
    assert output.scores is not None
    return output, output.scores


def alone(model: PreTrainedModel, ids: Sequence[int]) -> Floats:
    """What a model gives of a prompt by itself."""
    with torch.no_grad():
        logits: Any = model(input_ids=torch.tensor([list(ids)])).logits
    return np.asarray(logits[0].double())


def close_to(found: Sequence[Sequence[float | None]], expected: Any) -> None:
    np.testing.assert_allclose(np.array(found, dtype=float), np.array(expected), rtol=1e-4, atol=1e-5)


def all_alone(model: PreTrainedModel) -> Floats:
    return np.stack([alone(model, ids) for ids in IDS])


def differing(diff: ActivationDiff) -> list[str]:
    return [part.what for part in diff.record.base.not_compared if part.differs is not False]


# Scores of prompts.


@pytest.mark.parametrize("name", MODELS)
def test_the_scores_are_those_of_each_prompt_alone(name: str) -> None:
    base = made(name)
    finetuned = changed(base)
    diff = compare(base, finetuned)
    output, scores = output_of(diff)
    b, f = all_alone(base), all_alone(finetuned)
    assert output.kind == "scores"
    close_to(scores.base, b)
    close_to(scores.finetuned, f)
    assert scores.relative_l2 == pytest.approx(np.linalg.norm(f - b) / np.linalg.norm(b), rel=1e-4)
    assert scores.mean_absolute_difference == pytest.approx(np.abs(f - b).mean(), rel=1e-4)
    ranks = np.mean([spearmanr(b[:, i], f[:, i]).statistic for i in range(b.shape[1])])
    assert scores.rank_correlation == pytest.approx(ranks, abs=1e-12)
    agreement = None if b.shape[1] == 1 else pytest.approx((b.argmax(1) == f.argmax(1)).mean())
    assert scores.agreement == agreement
    of_next_tokens = ("kl_base_finetuned", "js", "top1_agreement", "logits_relative_l2")
    assert {getattr(output, field) for field in of_next_tokens} == {None}
    # The states are the same, and the head is not.
    assert (diff.summary.verdict, diff.summary.max_divergence, differing(diff)) == ("changed", 0, [])
    with pytest.raises(GateNotMetError):
        diff.check_gates(expect="identical")


@pytest.mark.parametrize("name", ["reward", "bert", "modernbert, mean"])
def test_the_same_head_is_identical_and_nothing_of_it_is_left_out(name: str) -> None:
    base = made(name)
    diff = compare(base, copy.deepcopy(base))
    assert diff.summary.verdict == "identical"
    assert output_of(diff)[1].relative_l2 == 0
    assert diff.record.base.not_compared == []
    diff.check_gates(expect="identical")


def test_padding_with_another_id_than_the_configured_one_changes_nothing() -> None:
    base = made("reward")
    base.config.pad_token_id = 99
    finetuned = changed(base)
    _, scores = output_of(compare(base, finetuned))
    close_to(scores.base, all_alone(base))
    # The whole model would find the end of a padded prompt elsewhere: what the tokenizer pads with is not 99.
    width = max(map(len, IDS))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in IDS])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in IDS])
    with torch.no_grad():
        batched: Any = base(input_ids=ids, attention_mask=mask).logits
    assert not np.allclose(batched.double().numpy(), all_alone(base), rtol=1e-2)


def test_a_prompt_that_ends_in_the_padding_token_is_scored_where_the_model_does() -> None:
    base = made("reward")
    ids = [5, 17, 80, 0, 0]
    diff = compare(base, changed(base), [*PROMPTS, "t5 t17 t80 t0 t0"])
    _, scores = output_of(diff)
    last = scores.base[-1][0]
    assert last == pytest.approx(alone(base, ids)[0], rel=1e-4)
    assert last == pytest.approx(alone(base, ids[:3])[0], rel=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 8, 512])
def test_no_score_depends_on_the_batches(batch_tokens: int) -> None:
    base = made("bert")
    _, scores = output_of(compare(base, changed(base), batch_tokens=batch_tokens))
    close_to(scores.base, all_alone(base))


@pytest.mark.parametrize("name", ["reward", "bert"])
def test_repeated_prompts_are_scored_once_and_counted_as_often(name: str) -> None:
    base = made(name)
    finetuned = changed(base)
    _, scores = output_of(compare(base, finetuned, [*PROMPTS, PROMPTS[0], PROMPTS[0]]))
    assert scores.base[-1] == scores.base[0]
    weights = [3.0] + [1.0] * (len(IDS) - 1)
    differences = np.abs(all_alone(finetuned) - all_alone(base)).mean(1)
    assert scores.mean_absolute_difference == pytest.approx(
        np.average(differences, weights=weights), rel=1e-4
    )


def test_a_shared_prefix_runs_with_every_prompt() -> None:
    base = made("reward")
    start = " ".join(f"t{i}" for i in range(3, 40))
    prompts = [f"{start} {prompt}" for prompt in (*PROMPTS, *(f"t{i}" for i in range(50, 60)))]
    diff = compare(base, changed(base), prompts)
    (note,) = notes_of(diff, "shared-prefix")
    assert "scores and embeddings are made of whole prompts" in note
    expected = [alone(base, [*range(3, 40), *ids]) for ids in IDS]
    close_to(output_of(diff)[1].base[: len(IDS)], expected)


def test_an_adapter_that_was_trained_with_its_head(tmp_path: Path) -> None:
    base = made("reward")
    folder = save_model(tmp_path / "base", base, word_tokenizer())
    adapted = get_peft_model(
        copy.deepcopy(base), LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    diff = activation_diff(folder, tmp_path / "adapter", PROMPTS)
    _, scores = output_of(diff)
    close_to(scores.finetuned, all_alone(adapted.eval()))
    assert (diff.summary.verdict, differing(diff)) == ("changed", [])


# What is not compared.


def test_a_language_model_and_a_reward_model_made_of_it_have_no_common_output(tmp_path: Path) -> None:
    reward = made("reward")
    torch.manual_seed(0)
    language = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    language.model.load_state_dict(reward.model.state_dict())
    diff = compare(language, reward)
    assert diff.record.output is None
    assert "score head (score)" in [part.what for part in diff.record.finetuned.not_compared]
    (note,) = notes_of(diff, "output-not-measured")
    assert note.startswith(f"only {diff.record.finetuned.id} gives scores or embeddings")
    assert diff.summary.verdict == "identical"
    with pytest.raises(GateNotMetError):
        diff.check_gates(expect="identical")


def test_a_head_that_no_file_holds_is_not_compared(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", made("reward"), word_tokenizer())
    headless = edit_weights(base, tmp_path / "headless", lambda tensors: tensors.pop("score.weight"))
    for pair in ((base, headless), (headless, base), (headless, headless)):
        diff = compare(*pair)
        assert diff.record.output is None
        (note,) = notes_of(diff, "output-not-measured")
        assert f"{headless} lacks score.weight, so its head holds random numbers" in note


def test_a_head_that_does_not_give_its_scores_of_the_states_alone_is_not_compared() -> None:
    base = made("reward")
    plain = base.forward

    def peeking(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = plain(input_ids=input_ids, **kwargs)
        # It looks at the stack's embeddings once more, which no state after the stack tells.
        output.logits = output.logits + base.model.rotary_emb.inv_freq.sum() * base.calls
        base.calls += 1
        return output

    base.calls = 0.0
    base.forward = peeking
    diff = compare(base, copy.deepcopy(made("reward")))
    assert diff.record.output is None
    (note,) = notes_of(diff, "output-not-measured")
    assert "does not give its scores of the states alone" in note


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_head_of_nan_is_told(side: str) -> None:
    base = made("reward")
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.score.weight.fill_(torch.nan)
    diff = compare(broken, base) if side == "base" else compare(base, broken)
    assert diff.record.output is None
    assert diff.summary.verdict is None or differing(diff)
    assert any("not finite" in note for note in notes_of(diff, "output-not-measured"))
    assert notes_of(diff, "broken-weights")
    with pytest.raises(GateNotMetError):
        diff.check_gates(expect="identical")


def test_scores_that_overflow_are_left_out_of_the_verdict() -> None:
    base = made("reward")
    huge = copy.deepcopy(base)
    with torch.no_grad():
        huge.score.weight.fill_(3e38)
    diff = compare(base, huge)
    assert diff.record.output is None
    assert diff.summary.verdict is None
    assert diff.summary.n_outputs_left_out
    (note,) = notes_of(diff, "not-finite")
    assert "its head makes of prompt 0 what is not finite" in note


# Labels.


def labelled(model: PreTrainedModel, labels: Sequence[str]) -> PreTrainedModel:
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: i for i, name in enumerate(labels)}
    return model


def test_labels_in_another_order_are_matched_by_their_names() -> None:
    base = labelled(made("bert"), ["joy", "fear", "anger"])
    order = [2, 0, 1]
    turned = labelled(copy.deepcopy(base), [["joy", "fear", "anger"][i] for i in order])
    with torch.no_grad():
        turned.classifier.weight.copy_(base.classifier.weight[order])
        turned.classifier.bias.copy_(base.classifier.bias[order])
    diff = compare(base, turned)
    _, scores = output_of(diff)
    assert scores.labels == ["joy", "fear", "anger"]
    assert scores.agreement == 1
    assert scores.relative_l2 is not None
    assert scores.relative_l2 < 1e-6
    assert diff.summary.verdict in ("identical", "within_noise")
    (note,) = notes_of(diff, "labels-matched")
    assert "'joy', 'fear', 'anger' in base, 'anger', 'joy', 'fear' in fine-tuned" in note


def test_only_labels_that_both_have_are_compared() -> None:
    base = labelled(made("bert"), ["joy", "fear", "anger"])
    torch.manual_seed(5)
    other = BertForSequenceClassification(BertConfig(**SIZES, num_labels=2)).eval()
    labelled(other, ["anger", "joy"])
    other.bert.load_state_dict(base.bert.state_dict())
    diff = compare(base, other)
    _, scores = output_of(diff)
    assert scores.labels == ["joy", "anger"]
    close_to(scores.base, all_alone(base)[:, [0, 2]])
    close_to(scores.finetuned, all_alone(other)[:, [1, 0]])
    assert differing(diff) == ["labels that the other does not have (fear)"]
    assert notes_of(diff, "labels-matched")


def test_labels_that_one_model_does_not_name_are_matched_by_their_numbers() -> None:
    base = made("bert")
    diff = compare(base, labelled(changed(base), ["joy", "fear", "anger"]))
    assert output_of(diff)[1].labels == ["joy", "fear", "anger"]
    (note,) = notes_of(diff, "labels-matched")
    assert note.startswith("labels were matched by their numbers")


@pytest.mark.parametrize("names", [None, ["x", "y"]])
def test_labels_that_cannot_be_matched_are_not_compared(names: list[str] | None) -> None:
    base = made("bert") if names is None else labelled(made("bert"), ["joy", "fear", "anger"])
    other = BertForSequenceClassification(BertConfig(**SIZES, num_labels=2)).eval()
    diff = compare(base, other if names is None else labelled(other, names))
    assert diff.record.output is None
    (note,) = notes_of(diff, "output-not-measured")
    assert "it is not known which labels are the same" in note
    assert "classification head (classifier)" in differing(diff)


# Scores of tokens.

TAGGERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForTokenClassification(BertConfig(**SIZES, num_labels=4)),
    "llama": lambda: LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=3)),
}


@pytest.mark.parametrize("position", ["last", "mean", "all", "0"])
@pytest.mark.parametrize("name", TAGGERS)
def test_the_scores_of_tokens_are_those_of_each_prompt_alone(name: str, position: str) -> None:
    torch.manual_seed(0)
    base = TAGGERS[name]().eval()
    finetuned = changed(base)
    diff = compare(base, finetuned, position=position)
    output, scores = output_of(diff)
    assert output.kind == "token_scores"
    places = {"last": slice(-1, None), "0": slice(0, 1)}.get(position)
    agreements, sizes, squares = [], [], []
    for ids in IDS:
        own = slice(min(1, len(ids) - 1), None) if places is None else places
        b, f = alone(base, ids)[own], alone(finetuned, ids)[own]
        agreements.append((b.argmax(1) == f.argmax(1)).mean())
        sizes.append(np.abs(f - b).mean())
        squares.append([((f - b) ** 2).sum(1).mean(), (b**2).sum(1).mean()])
    assert scores.agreement == pytest.approx(np.mean(agreements))
    assert scores.mean_absolute_difference == pytest.approx(np.mean(sizes), rel=1e-4)
    difference, length = np.sum(squares, axis=0)
    assert scores.relative_l2 == pytest.approx((difference / length) ** 0.5, rel=1e-4)
    assert (scores.rank_correlation, scores.base) == (None, [])
    assert (diff.summary.verdict, differing(diff)) == ("changed", [])


# Embeddings.

POOLING: dict[str, Callable[[Floats], Floats]] = {
    "cls_token": lambda s: s[0],
    "max_tokens": lambda s: s.max(0),
    "mean_tokens": lambda s: s.mean(0),
    "mean_sqrt_len_tokens": lambda s: s.sum(0) / np.sqrt(len(s)),
    "weightedmean_tokens": lambda s: np.average(s, axis=0, weights=np.arange(1, len(s) + 1)),
    "lasttoken": lambda s: s[-1],
}
"""the modes in the order in which sentence-transformers puts several together"""


def save_encoder(
    folder: Path, model: PreTrainedModel, modes: Sequence[str], dense: nn.Linear | None = None, **pooling: Any
) -> Path:
    """A sentence-transformers folder: pooling, perhaps a dense layer with a tanh, and normalisation."""
    save_model(folder, model, word_tokenizer())
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "3_Normalize")]
    if dense is not None:
        kinds.insert(2, ("Dense", "2_Dense"))
        (folder / "2_Dense").mkdir()
        settings = {
            "in_features": dense.in_features,
            "out_features": dense.out_features,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
        tensors = {f"linear.{name}": t.detach().clone() for name, t in dense.state_dict().items()}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    flags = {f"pooling_mode_{mode}": mode in modes for mode in POOLING}
    settings = {"word_embedding_dimension": 32, **flags, **pooling}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder


def embedding(
    model: PreTrainedModel, ids: Sequence[int], modes: Sequence[str], dense: nn.Linear | None
) -> Floats:
    with torch.no_grad():
        output: Any = model(input_ids=torch.tensor([list(ids)]))
    states = output.last_hidden_state[0].double().numpy()
    found = np.concatenate([pool(states) for mode, pool in POOLING.items() if mode in modes])
    if dense is not None:
        weight, bias = (p.detach().double().numpy() for p in (dense.weight, dense.bias))
        found = np.tanh(weight @ found + bias)
    return np.asarray(found / np.linalg.norm(found))


ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES)),
    "t5": lambda: T5EncoderModel(
        T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, pad_token_id=0)
    ),
}


@pytest.mark.parametrize(
    ("name", "modes", "has_dense"),
    [
        *(("bert", [mode], False) for mode in POOLING),
        ("bert", ["cls_token", "mean_tokens"], True),
        ("llama", ["lasttoken"], False),
        ("t5", ["mean_tokens"], True),
    ],
)
def test_embeddings_are_those_of_each_prompt_alone(
    name: str, modes: list[str], has_dense: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = ENCODERS[name]().eval()
    finetuned = changed(base, "1", by=0.05)
    dense = nn.Linear(32 * len(modes), 24) if has_dense else None
    folders = [
        save_encoder(tmp_path / side, model, modes, dense) for side, model in (("b", base), ("f", finetuned))
    ]
    diff = compare(folders[0], folders[1])
    output, scores = output_of(diff)
    assert output.kind == "embedding"
    b, f = (np.stack([embedding(m, ids, modes, dense) for ids in IDS]) for m in (base, finetuned))
    divergence = ((b - f) ** 2).sum(1) / 2
    assert scores.divergence == pytest.approx(divergence.mean(), rel=1e-3)
    pairs = np.triu_indices(len(IDS), 1)
    ranks = spearmanr((b @ b.T)[pairs], (f @ f.T)[pairs]).statistic
    assert scores.rank_correlation == pytest.approx(ranks, abs=0.02)
    assert scores.relative_l2 == pytest.approx(np.linalg.norm(f - b) / np.linalg.norm(b), rel=1e-3)
    assert (scores.labels, scores.agreement, scores.base) == ([], None, [])
    assert not [p.what for p in diff.record.base.not_compared if "module" in p.what]


def test_a_change_of_the_pooling_or_of_the_dense_layer_alone_is_a_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, dense = ENCODERS["bert"]().eval(), nn.Linear(32, 24)
    base = save_encoder(tmp_path / "base", model, ["mean_tokens"], dense)
    twin = save_encoder(tmp_path / "twin", model, ["mean_tokens"], dense)
    pooled = save_encoder(tmp_path / "pooled", model, ["cls_token"], dense)
    trained = save_encoder(tmp_path / "trained", model, ["mean_tokens"], nn.Linear(32, 24))
    for other in (pooled, trained):
        diff = compare(base, other)
        assert diff.summary.verdict == "changed"
        assert "at the embeddings" in str(diff)
    same = compare(base, twin)
    assert same.summary.verdict == "identical"
    same.check_gates(expect="identical")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pooling_mode_attention": True}, "pooling_mode_attention"),
        ("modules", "is a module of the kind CNN"),
        ("pickled", "has no model.safetensors"),
        ("activation", "a dense layer of another kind"),
        ("lower case", "lower case"),
        ("widths", "do not fit"),
    ],
)
def test_modules_that_are_not_known_are_not_compared(change: Any, told: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, dense = ENCODERS["bert"]().eval(), nn.Linear(32, 24)
    base = save_encoder(tmp_path / "base", model, ["mean_tokens"], dense)
    other = save_encoder(tmp_path / "other", model, ["mean_tokens"], dense)
    if isinstance(change, dict):
        edit_json(other / "1_Pooling" / "config.json", **change)
    elif change == "modules":
        text = (other / "modules.json").read_text().replace("models.Normalize", "models.CNN")
        (other / "modules.json").write_text(text)
    elif change == "pickled":
        (other / "2_Dense" / "model.safetensors").unlink()
    elif change == "activation":
        edit_json(other / "2_Dense" / "config.json", activation_function="custom.Swish")
    elif change == "lower case":
        (other / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    else:
        edit_json(other / "1_Pooling" / "config.json", pooling_mode_cls_token=True)
    diff = compare(base, other)
    assert diff.record.output is None
    (note,) = notes_of(diff, "output-not-measured")
    assert told in note
    assert "Dense module (2_Dense)" in [part.what for part in diff.record.base.not_compared]
    with pytest.raises(GateNotMetError):
        diff.check_gates(expect="identical")


def test_the_newer_name_of_a_pooling_mode_is_read(tmp_path: Path) -> None:
    model = ENCODERS["bert"]().eval()
    base = save_encoder(tmp_path / "base", model, ["lasttoken"])
    other = save_encoder(tmp_path / "other", model, [])
    (other / "1_Pooling" / "config.json").write_text(
        '{"embedding_dimension": 32, "pooling_mode": "lasttoken"}'
    )
    assert output_of(compare(base, other))[1].relative_l2 == 0


def test_prompts_that_sentence_transformers_would_cut_are_told(tmp_path: Path) -> None:
    model = ENCODERS["bert"]().eval()
    folders = [save_encoder(tmp_path / name, model, ["mean_tokens"]) for name in ("base", "twin")]
    for folder in folders:
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    (note,) = notes_of(compare(folders[0], folders[1]), "embedded-whole")
    assert "up to 7 tokens" in note
    assert not notes_of(compare(folders[0], folders[1], PROMPTS[:2]), "embedded-whole")


def test_only_one_sentence_encoder_has_no_common_output(tmp_path: Path) -> None:
    model = ENCODERS["bert"]().eval()
    base = save_encoder(tmp_path / "base", model, ["mean_tokens"])
    diff = activation_diff(base, save_model(tmp_path / "plain", model, word_tokenizer()), PROMPTS)
    assert diff.record.output is None
    assert notes_of(diff, "output-not-measured")
    assert "Pooling module (1_Pooling)" in differing(diff)


# Ways to run.


@pytest.mark.parametrize("kind", ["reward", "tagger", "encoder"])
def test_streamed_and_in_shards_the_numbers_are_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = {"reward": MODELS["reward"], "tagger": TAGGERS["bert"], "encoder": ENCODERS["bert"]}[
        kind
    ]().eval()
    other = changed(model, "1", by=0.05)
    if kind == "encoder":
        folders = [save_encoder(tmp_path / n, m, ["mean_tokens"]) for n, m in (("b", model), ("f", other))]
    else:
        folders = [save_model(tmp_path / n, m, word_tokenizer()) for n, m in (("b", model), ("f", other))]
    whole = compare(folders[0], folders[1], PROMPTS, batch_tokens=8)
    expected = output_of(whole)[0]
    ways: list[dict[str, Any]] = [{"memory": "stream"}, {"work_dir": str(tmp_path / "work")}]
    for options in ways:
        found, _ = output_of(compare(folders[0], folders[1], PROMPTS, batch_tokens=8, **options))
        assert found.kind == expected.kind
        assert found.noise_floor == pytest.approx(expected.noise_floor)
        assert_same(found.scores, expected.scores)


def test_a_folder_of_work_is_refused_when_a_module_has_changed(tmp_path: Path) -> None:
    model, work = ENCODERS["bert"]().eval(), str(tmp_path / "work")
    folders = [save_encoder(tmp_path / name, model, ["mean_tokens"]) for name in ("base", "twin")]
    compare(folders[0], folders[1], work_dir=work)
    edit_json(folders[1] / "1_Pooling" / "config.json", pooling_mode_cls_token=True)
    with pytest.raises(UsageError, match=r"1_Pooling/config\.json"):
        compare(folders[0], folders[1], work_dir=work)


def assert_same(one: Scores | None, other: Scores | None) -> None:
    assert one is not None
    assert other is not None
    assert one.labels == other.labels
    for name in Scores.__struct_fields__[1:]:
        ours, theirs = (np.array(getattr(each, name), dtype=float) for each in (one, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=name)


def test_a_shuffle_of_neurons_is_within_the_noise_of_the_scores() -> None:
    """The same function, in another order of summation."""
    base = made("reward")
    other = copy.deepcopy(base)
    with torch.no_grad():
        for layer in other.model.layers:
            order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight.copy_(projection.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    diff = compare(base, other)
    output, scores = output_of(diff)
    assert diff.summary.verdict == "within_noise"
    assert output.noise_floor is not None
    assert scores.relative_l2 is not None
    assert 0 < scores.relative_l2 < output.noise_floor < 1e-4


def test_without_a_noise_floor_there_is_no_verdict_of_changed_scores() -> None:
    base = made("reward")
    diff = compare(base, changed(base), no_noise_floor=True)
    assert output_of(diff)[0].noise_floor is None
    assert diff.summary.verdict is None


# What cannot be said.


def test_one_prompt_has_no_order() -> None:
    base = made("reward")
    _, scores = output_of(compare(base, changed(base), PROMPTS[:1]))
    assert scores.mean_absolute_difference is not None
    intervals = (scores.rank_correlation_interval, scores.mean_absolute_difference_interval)
    assert (scores.rank_correlation, *intervals) == (None, None, None)


def test_scores_that_are_all_the_same_have_no_order() -> None:
    base = made("reward")
    with torch.no_grad():
        base.score.weight.zero_()
    diff = compare(base, copy.deepcopy(base))
    _, scores = output_of(diff)
    assert (scores.rank_correlation, scores.relative_l2) == (None, 0)
    assert diff.summary.verdict == "identical"


def test_a_result_is_saved_shown_and_read(tmp_path: Path) -> None:
    base = labelled(made("bert"), ["joy", "fear", "anger"])
    diff = compare(base, changed(base))
    for suffix in ("json", "html", "md", "csv"):
        diff.save(tmp_path / f"result.{suffix}")
    read = load_result(tmp_path / "result.json")
    assert isinstance(read, ActivationDiff)
    assert read.record.output == diff.record.output
    assert "Scores: the first label agrees on" in str(read)
    page = (tmp_path / "result.html").read_text()
    assert "Does it matter to the scores?" in page
    assert "Rank correlation" in page
    assert "joy, fear, anger" in page

    # A result of a version that knew no scores.
    older = json.loads((tmp_path / "result.json").read_text())
    del older["output"]["kind"], older["output"]["scores"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    found = load_result(tmp_path / "older.json")
    assert isinstance(found, ActivationDiff)
    assert found.record.output is not None
    assert (found.record.output.kind, found.record.output.scores) == ("next_token", None)


# Statistics.


def test_rank_correlation_is_spearmans_with_ties() -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 5, (40, 3)).astype(float)
    y = x + random.integers(0, 4, x.shape).astype(float)
    expected = np.mean([spearmanr(x[:, i], y[:, i]).statistic for i in range(3)])
    found, interval = rank_correlation(x, y, 0)
    assert found == pytest.approx(expected, abs=1e-13)
    assert interval is not None
    assert interval[0] < expected < interval[1]
    shuffled = random.permutation(40)
    assert rank_correlation(x[shuffled], y[shuffled], 0) == (found, interval)


def test_a_column_without_an_order_is_left_out_of_the_rank_correlation() -> None:
    x: Floats = np.stack([np.arange(6.0), np.ones(6)], axis=1)
    assert rank_correlation(x, x, 0) == (1.0, None)
    assert np.isnan(rank_correlation(x[:, 1:], x[:, 1:], 0)[0])
    assert np.isnan(rank_correlation(x[:2], x[:2], 0)[0])


def test_intervals_of_ranks_cover_the_truth() -> None:
    random, rho, n_trials = np.random.default_rng(3), 0.9, 120
    truth = 6 / np.pi * np.arcsin(rho / 2)  # of a bivariate normal distribution (Pearson 1907)
    hits = 0
    for seed in range(n_trials):
        z = random.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 30)
        interval = rank_correlation(z[:, :1], z[:, 1:], seed)[1]
        assert interval is not None
        hits += interval[0] <= truth <= interval[1]
    assert hits / n_trials > 0.88


def test_similarity_correlation_takes_pairs_of_different_prompts() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((12, 5))
    y = np.concatenate([x, 0.3 * random.standard_normal((12, 3))], axis=1)
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y)]
    pairs = np.triu_indices(12, 1)
    expected = spearmanr(*((u @ u.T)[pairs] for u in units)).statistic
    found, interval = similarity_correlation(x, y, 0)
    assert found == pytest.approx(expected, abs=1e-13)
    assert interval is not None
    assert interval[0] < found < interval[1]


@pytest.mark.parametrize("n_hits", [0, 7, 20])
def test_the_interval_of_a_share_is_wilsons(n_hits: int) -> None:
    values = np.array([1.0] * n_hits + [0.0] * (20 - n_hits) + [np.nan])
    expected = binomtest(n_hits, 20).proportion_ci(0.95, method="wilson")
    assert share_interval(values) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert share_interval(values[:4]) is None


def test_the_interval_of_a_size_goes_with_its_unit() -> None:
    values = np.random.default_rng(0).lognormal(size=40)
    one, other = size_interval(values, 0), size_interval(values * 1000, 0)
    assert one is not None
    assert other is not None
    assert other == pytest.approx([1000 * end for end in one], rel=1e-12)
    assert one[0] < values.mean() < one[1]
    assert size_interval(np.zeros(6), 0) == (0, 0)
    assert size_interval(values[:4], 0) is None
