"""A recording takes the place of a model: the same numbers, and a clear error for one that is damaged."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import safetensors.numpy
import torch
from typer.testing import CliRunner

import lazarus
from architectures import OF_EACH_KIND, build
from factories import notes_of, perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus import BFloat16Bits, Recording
from lazarus.cli import app
from lazarus.errors import (
    LazarusError,
    PositionError,
    PromptsError,
    RecordingError,
    ShapeMismatchError,
    TokenizerMismatchError,
    UsageError,
)
from lazarus.recordings import recording_schema

TEXTS = ["t5 t17 t80 t3 t21", "t9 t33", "t12 t77 t31 t8 t9", "t9 t33", "t64 t7 t51"]
MEASURED = (
    "divergence",
    "relative_l2",
    "norm_ratio",
    "cka",
    "noise_floor",
    "noise_floor_divergence",
    "interval",
    "unrelated_similarity",
    "top1_share",
)


def recorded(model: Any, folder: Path, texts: Any = TEXTS, **options: Any) -> Recording:
    return lazarus.record(model, texts, folder, tokenizer=word_tokenizer(), **options)


def compare(base: Any, finetuned: Any, texts: Any = None, **options: Any) -> lazarus.ActivationDiff:
    return lazarus.activation_diff(base, finetuned, texts, tokenizer=word_tokenizer(), **options)


def numbers(diff: lazarus.ActivationDiff) -> Any:
    """Every number of every layer and site, and the effect on the output."""
    places = [*diff.record.layers, *diff.record.sites]
    return [[getattr(place, name) for name in MEASURED] for place in places], list(diff.record.results)


def written(folder: Path) -> Path:
    """Write two prompts as a runtime without torch would; returns the folder."""
    with Recording.create(folder, model="m", n_layers=1, hidden_size=4, runtime="mine") as recording:
        for ids in ([1, 2, 3], [4, 5]):
            states = np.arange(4 * len(ids), dtype=np.float32).reshape(-1, 4)
            recording.add(ids, {"embedding": states, "resid_post.0": states + 1})
    return folder


# The numbers are those of the live run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("position", ["last", "mean", "all", "1"])
def test_the_numbers_of_a_recording_are_those_of_the_model(tmp_path: Path, position: str, dtype: str) -> None:
    base = tiny_llama().to(getattr(torch, dtype))
    finetuned = perturbed(base, 0.05)
    recorded(finetuned, tmp_path / "f", logits=True, top_k=0)
    live = compare(base, finetuned, TEXTS, position=position)
    found = compare(base, tmp_path / "f", position=position)
    assert numbers(found) == numbers(live)
    assert found.record.output == live.record.output
    assert found.record.tokens == live.record.tokens
    assert found.summary.verdict == live.summary.verdict == "changed"


@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_two_recordings_give_what_two_models_give_but_for_the_noise(tmp_path: Path, position: str) -> None:
    base = tiny_llama()
    recorded(base, tmp_path / "b", logits=True, top_k=0)
    recorded(perturbed(base), tmp_path / "f", logits=True, top_k=0)
    live = compare(base, perturbed(base), TEXTS, position=position)
    noise = {"noise_floor", "noise_floor_divergence"}
    for pair in ((tmp_path / "b", tmp_path / "f"), (tmp_path / "b", perturbed(base))):
        found = compare(*pair, position=position)
        for one, other in zip(found.layers, live.layers, strict=True):
            for name in set(MEASURED) - noise:
                # Prompts are summed up in another order.
                value = getattr(other, name)
                assert getattr(one, name) == (value and pytest.approx(value, rel=1e-12)), name
        assert found.record.output is not None
        assert live.record.output is not None
        expected = pytest.approx(live.record.output.kl_base_finetuned, rel=1e-12)
        assert found.record.output.kl_base_finetuned == expected
        assert found.summary.verdict is None
        assert "noise-not-measured" in found.note_codes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(OF_EACH_KIND))
def test_every_architecture_is_recorded_and_read_back(name: str, dtype: str, tmp_path: Path) -> None:
    if (name, dtype) == ("inkling2_text", "bfloat16"):
        pytest.skip("its own code multiplies float32 by bfloat16")
    model = build(name).to(getattr(torch, dtype))
    finetuned = perturbed(model, 0.05)
    texts = ["t5 t17 t18 t3", "t9 t33"]
    recorded(finetuned, tmp_path / "f", texts)
    for position in ("last", "mean", "all"):
        live = compare(model, finetuned, texts, position=position)
        assert numbers(compare(model, tmp_path / "f", position=position)) == numbers(live), position


def test_streamed_and_resumed_it_is_the_same_recording(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_llama(), word_tokenizer())
    runs: list[dict[str, Any]] = [
        {},
        {"memory": "stream"},
        {"work_dir": str(tmp_path / "work")},
        {"work_dir": str(tmp_path / "streamed"), "memory": "stream", "batch_tokens": 4},
    ]
    for number, options in enumerate(runs):
        lazarus.record(folder, TEXTS, tmp_path / str(number), sites="all", logits=True, top_k=0, **options)
    first = Recording.open(tmp_path / "0")
    for number in range(1, len(runs)):
        other = Recording.open(tmp_path / str(number))
        assert other.sites == first.sites
        assert other.contents.prompts == first.contents.prompts
        for prompt in range(len(TEXTS)):
            for site in first.sites:
                np.testing.assert_allclose(other.rows(prompt, site), first.rows(prompt, site), atol=2e-5)


def test_an_interrupted_recording_goes_on_where_it_was(tmp_path: Path) -> None:
    class Impatient:
        n_batches = 0

        def loading(self, *_: Any) -> None: ...
        def testing(self, *_: Any) -> None: ...
        def running(self, *_: Any) -> None: ...

        def advanced(self, _: int) -> None:
            self.n_batches += 1
            if self.n_batches == 3:
                raise KeyboardInterrupt

    model, work = tiny_llama(), str(tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        recorded(model, tmp_path / "r", work_dir=work, batch_tokens=4, observer=Impatient())
    assert not (tmp_path / "r" / "recording.json").exists()
    kept = set((tmp_path / "r").iterdir())
    found = recorded(model, tmp_path / "r", work_dir=work, batch_tokens=4)
    assert kept
    assert any("were already in" in note for note in found.contents.notes)
    whole = recorded(model, tmp_path / "whole", batch_tokens=4)
    for prompt in range(len(TEXTS)):
        assert np.array_equal(found.rows(prompt, "resid_post.3"), whole.rows(prompt, "resid_post.3"))


def test_without_a_work_folder_an_interrupted_recording_leaves_nothing(tmp_path: Path) -> None:
    class Impatient:
        def loading(self, *_: Any) -> None: ...
        def testing(self, *_: Any) -> None: ...
        def running(self, *_: Any) -> None: ...

        def advanced(self, _: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded(tiny_llama(), tmp_path / "r", observer=Impatient())
    assert list((tmp_path / "r").iterdir()) == []


# The likeliest tokens alone


@pytest.mark.parametrize("position", ["last", "all"])
def test_the_likeliest_tokens_bound_the_divergence_from_below(tmp_path: Path, position: str) -> None:
    base = tiny_llama()
    finetuned = perturbed(base, 0.05)
    live = compare(base, finetuned, TEXTS, position=position).record.output
    assert live is not None
    for k, rel in ((5, None), (300, 1e-6)):
        recorded(base, tmp_path / f"b{k}", logits=True, top_k=k)
        recorded(finetuned, tmp_path / f"f{k}", logits=True, top_k=k)
        sides: list[tuple[Any, Any]] = [
            (base, tmp_path / f"f{k}"),
            (tmp_path / f"b{k}", finetuned),
            (tmp_path / f"b{k}", tmp_path / f"f{k}"),
        ]
        for pair in sides:
            diff = compare(*pair, position=position)
            found = diff.record.output
            assert found is not None
            assert notes_of(diff, "likeliest-tokens")
            assert found.top1_agreement == live.top1_agreement
            assert found.logits_relative_l2 is None
            for name in ("kl_base_finetuned", "kl_finetuned_base", "js"):
                value, whole = getattr(found, name), getattr(live, name)
                assert 0 < value <= whole * (1 + 1e-6)
                if rel:
                    assert value == pytest.approx(whole, rel=rel)
        assert compare(base, tmp_path / f"b{k}", position=position).summary.verdict == "identical"


# Each block on the recorded states


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_the_block_that_differs_is_named_and_inherits_nothing(tmp_path: Path, memory: str) -> None:
    base, changed = tiny_llama(), tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    folder = save_model(tmp_path / "m", base, word_tokenizer())
    recorded(changed, tmp_path / "f")
    found = lazarus.activation_diff(folder, tmp_path / "f", localize=True, memory=memory)
    local = {layer.layer: layer.local for layer in found.layers}
    assert found.summary.most_changed_block == 1
    for layer, change in local.items():
        assert change is not None
        assert change.noise_floor is not None
        assert change.relative_l2 is not None
        assert (change.relative_l2 > change.noise_floor) == (layer == 1)
    # Later layers inherit the difference, and their blocks are the same.
    assert found.layers[3].relative_l2 > found.layers[3].noise_floor  # type: ignore[operator]


def test_what_a_block_makes_of_the_recorded_state_is_what_the_model_itself_would(tmp_path: Path) -> None:
    base = tiny_llama()
    changed = perturbed(base)
    recorded(changed, tmp_path / "f", ["t5 t17 t80 t3 t21"])
    found = compare(base, tmp_path / "f", localize=True, position="all")
    ids = torch.tensor([[5, 17, 80, 3, 21]])
    with torch.no_grad():
        states = changed.model(ids, output_hidden_states=True).hidden_states
        rope = base.model.rotary_emb(states[0], torch.arange(5)[None])
        mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
        for layer in range(3):  # the last of `hidden_states` is after the final norm
            own = base.model.layers[layer](states[layer], attention_mask=mask, position_embeddings=rope)
            own = own[0] if isinstance(own, tuple) else own
            after = states[layer + 1]
            expected = ((own - after).norm(dim=-1) / after.norm(dim=-1))[0, 1:].mean().item()
            local = found.layers[layer].local
            assert local is not None
            assert local.relative_l2 == pytest.approx(expected, rel=1e-4)


def test_where_base_is_recorded_the_live_blocks_run_on_its_states(tmp_path: Path) -> None:
    base = tiny_llama()
    changed = perturbed(base)
    recorded(base, tmp_path / "b")
    live = compare(base, changed, TEXTS, localize=True, position="all")
    found = compare(tmp_path / "b", changed, localize=True, position="all")
    for one, other in zip(found.layers, live.layers, strict=True):
        assert one.local is not None
        assert other.local is not None
        assert one.local.relative_l2 == pytest.approx(other.local.relative_l2, rel=1e-5)


# The noise


def test_another_recording_of_base_is_noise(tmp_path: Path) -> None:
    base = tiny_llama()
    recorded(base, tmp_path / "b", logits=True, top_k=0)
    again = perturbed(base, 1e-3)
    recorded(again, tmp_path / "again", logits=True, top_k=0)
    recorded(perturbed(base, 1e-3, seed=2), tmp_path / "f", logits=True, top_k=0)
    for pair in ((base, tmp_path / "f"), (tmp_path / "b", tmp_path / "f")):
        assert compare(*pair).summary.verdict in ("changed", None)
        found = compare(*pair, noise_from=str(tmp_path / "again"))
        assert found.summary.verdict == "within_noise"
        # The floor is a multiple of the difference between the two recordings of base.
        difference = compare(base, again, TEXTS).layers[2].relative_l2
        assert found.layers[2].noise_floor == pytest.approx(1.75 * difference, rel=1e-9)  # type: ignore[operator]
    recorded(again, tmp_path / "last", position="last")
    found = compare(base, tmp_path / "f", noise_from=str(tmp_path / "last"), localize=True)
    assert found.layers[2].local is not None
    for itself in ("b", "f"):
        with pytest.raises(UsageError, match="is itself compared"):
            compare(tmp_path / "b", tmp_path / "f", noise_from=str(tmp_path / itself))


def test_rounding_to_another_type_is_no_verdict(tmp_path: Path) -> None:
    model = tiny_llama()
    recorded(tiny_llama().to(torch.bfloat16), tmp_path / "r")
    found = compare(model, tmp_path / "r", localize=True)
    assert found.summary.verdict is None
    assert notes_of(found, "run-dtypes")
    # What a block may differ by is known: its states are rounded to the type of the recording.
    assert all(layer.local is not None and layer.local.noise_floor for layer in found.layers)


def test_the_noise_of_two_models_is_not_taken_from_a_recording(tmp_path: Path) -> None:
    recorded(tiny_llama(), tmp_path / "b")
    with pytest.raises(UsageError, match="neither model is one"):
        compare(tiny_llama(), tiny_llama(), TEXTS, noise_from=str(tmp_path / "b"))


# What is not known is told


def test_a_recording_of_the_same_model_is_identical_in_what_was_compared(tmp_path: Path) -> None:
    model = tiny_llama()
    recorded(model, tmp_path / "r")
    found = compare(model, tmp_path / "r")
    assert found.summary.verdict == "identical"
    assert found.summary.weights_identical is None
    assert found.record.output is None
    with pytest.raises(LazarusError, match="it is not known"):
        found.check_gates(expect="identical")
    found.check_gates(expect="identical", only_compared=True)


def test_what_was_not_recorded_is_null_and_listed(tmp_path: Path) -> None:
    model = tiny_llama()
    whole = recorded(model, tmp_path / "r")
    with Recording.create(tmp_path / "part", model="m", n_layers=4, hidden_size=32) as part:
        for prompt in whole.prompts:
            part.add(prompt.ids, {"resid_post.2": whole.rows(prompt.index, "resid_post.2")}, text=prompt.text)
    found = compare(model, tmp_path / "part")
    assert [layer.divergence for layer in found.layers] == [None, None, 0.0, None]
    told = [part.what for part in found.record.finetuned.not_compared]
    assert any("layers 0 to 1, 3" in what for what in told)
    assert any("final norm" in what for what in told)


def test_a_recording_says_what_ran_it(tmp_path: Path) -> None:
    found = compare(tiny_llama(), written_like(tiny_llama(), tmp_path / "r"))
    assert found.record.finetuned.kind == "recording"
    assert found.record.finetuned.runtime == "mine 1.2"
    assert any("run by mine 1.2" in note for note in found.notes)


def written_like(model: Any, folder: Path) -> Path:
    """Record a model by NumPy arrays, as another runtime would."""
    known: dict[str, Any] = {"n_layers": 4, "hidden_size": 32, "runtime": "mine", "runtime_version": "1.2"}
    with Recording.create(folder, model="m", **known) as recording:
        for text in TEXTS:
            ids = [int(word[1:]) for word in text.split()]
            with torch.no_grad():
                states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            rows = {f"resid_post.{i}": states[i + 1][0].numpy() for i in range(3)}
            recording.add(ids, {"embedding": states[0][0].numpy(), **rows}, text=text)
    return folder


# Which prompts


def test_prompts_that_are_given_as_well_are_the_same_or_the_first_difference_is_named(tmp_path: Path) -> None:
    model = tiny_llama()
    recorded(model, tmp_path / "r")
    assert compare(model, tmp_path / "r", TEXTS).summary.verdict == "identical"
    with pytest.raises(RecordingError, match=r"Prompt 2: at token 1 .* has 77, and the prompts .* 78"):
        compare(model, tmp_path / "r", [*TEXTS[:2], "t12 t78 t31 t8 t9", *TEXTS[3:]])
    with pytest.raises(RecordingError, match="has 5 prompts, and the prompts that were given 2"):
        compare(model, tmp_path / "r", TEXTS[:2])
    recorded(model, tmp_path / "other", TEXTS[:4])
    with pytest.raises(RecordingError, match="has 5 prompts"):
        compare(tmp_path / "r", tmp_path / "other")


def test_no_prompt_and_no_recording_is_a_usage_error() -> None:
    with pytest.raises(PromptsError, match="neither model is a recording"):
        lazarus.activation_diff(tiny_llama(), tiny_llama())


def test_the_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    lazarus.record(model, ["Hello, how are you?"], tmp_path / "r", tokenizer=tiny_tokenizer())
    with pytest.raises(TokenizerMismatchError, match="Prompt 0"):
        lazarus.activation_diff(model, tmp_path / "r", tokenizer=tiny_tokenizer(290))


def test_ids_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    with Recording.create(tmp_path / "r", model="m", n_layers=4, hidden_size=32) as recording:
        recording.add([1, 700], {"embedding": np.zeros((2, 32), np.float32)})
    with pytest.raises(LazarusError, match="token id 700"):
        compare(tiny_llama(), tmp_path / "r")


def test_tokens_that_were_not_recorded_cannot_be_compared(tmp_path: Path) -> None:
    model = tiny_llama()
    found = recorded(model, tmp_path / "r", position="last")
    assert found.contents.positions == "compared"
    assert compare(model, tmp_path / "r").summary.verdict == "identical"
    with pytest.raises(PositionError, match="no states of token 1 of prompt 0"):
        compare(model, tmp_path / "r", position="all")
    with pytest.raises(RecordingError, match="states of some tokens alone"):
        compare(model, tmp_path / "r", localize=True)


def test_what_needs_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    recorded(model, tmp_path / "r")
    for options in ({"attribute": "blocks"}, {"readout": "auto"}):
        with pytest.raises(UsageError, match="a recording has none"):
            compare(model, tmp_path / "r", **options)
    with pytest.raises(UsageError, match="both are recordings"):
        compare(tmp_path / "r", tmp_path / "r", localize=True)
    recorded(tiny_llama(num_hidden_layers=2), tmp_path / "short")
    with pytest.raises(ShapeMismatchError, match="4 blocks of 32 features and 2 of 32"):
        compare(model, tmp_path / "short", localize=True)
    matched = [layer.finetuned_layer for layer in compare(model, tmp_path / "short").layers]
    assert matched == [None, 0, 1, 1]
    with pytest.raises(UsageError, match="lets each model read the text"):
        compare(model, tmp_path / "r", align="text")


def test_responses_that_were_not_recorded_cannot_be_compared(tmp_path: Path) -> None:
    model = tiny_llama()
    recorded(model, tmp_path / "r")
    with pytest.raises(PositionError, match="does not tell where the response of prompt 0 is"):
        compare(model, tmp_path / "r", position="response")


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ({"logits": np.zeros((2, 320), np.float32)}, "has 320 next tokens"),
        ({"top_ids": np.full((2, 1), 310, np.int32), "top_logprobs": np.full((2, 2), -0.7)}, "token 310"),
        ({"top_ids": np.full((2, 1), -1, np.int32), "top_logprobs": np.full((2, 2), -0.7)}, "token -1"),
    ],
    ids=["logits", "beyond", "below"],
)
def test_next_tokens_of_another_vocabulary_are_refused(tmp_path: Path, output: Any, told: str) -> None:
    for name, next_tokens in (("r", output), ("whole", {"logits": np.zeros((2, 300), np.float32)})):
        with Recording.create(tmp_path / name, model="m", n_layers=4, hidden_size=32) as recording:
            recording.add([1, 2], {"resid_post.0": np.ones((2, 32), np.float32)} | next_tokens)
    for other in (tiny_llama(), tmp_path / "whole"):
        with pytest.raises(RecordingError, match=f"{told}.*two vocabularies"):
            compare(other, tmp_path / "r")


def test_another_recording_in_the_same_place_is_another_run(tmp_path: Path) -> None:
    base, work = tiny_llama(), str(tmp_path / "work")
    recorded(perturbed(base), tmp_path / "r")
    compare(base, tmp_path / "r", work_dir=work)
    manifest = (tmp_path / "r" / "recording.json").read_bytes()
    shutil.rmtree(tmp_path / "r")
    recorded(perturbed(base, seed=2), tmp_path / "r")
    assert (tmp_path / "r" / "recording.json").read_bytes() == manifest
    with pytest.raises(UsageError, match="another run"):
        compare(base, tmp_path / "r", work_dir=work)


# The format


def test_the_format_is_what_its_schema_says(tmp_path: Path) -> None:
    recorded(tiny_llama(), tmp_path / "r", ["t1 t2"])
    found = json.loads((tmp_path / "r" / "recording.json").read_bytes())
    jsonschema.validate(found, recording_schema())
    del found["prompts"][0]["ids"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, recording_schema())


def test_any_reader_of_safetensors_reads_the_states(tmp_path: Path) -> None:
    model = tiny_llama()
    found = recorded(model, tmp_path / "r", ["t1 t2"])
    tensors = safetensors.numpy.load_file(tmp_path / "r" / "00000.safetensors")
    assert set(tensors) == {f"0/{site}" for site in found.sites}
    with torch.no_grad():
        states = model.model(torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(tensors["0/resid_post.1"], states[2][0].numpy(), rtol=1e-5, atol=1e-6)


def test_bfloat16_goes_through_by_its_bits(tmp_path: Path) -> None:
    states = torch.randn(3, 4).to(torch.bfloat16)
    bits = states.view(torch.int16).numpy().view(np.uint16)
    known: dict[str, Any] = {"n_layers": 1, "hidden_size": 4, "run_dtype": "bfloat16"}
    with Recording.create(tmp_path / "r", model="m", **known) as recording:
        recording.add([1, 2, 3], {"resid_post.0": BFloat16Bits(bits)})
    assert np.array_equal(Recording.open(tmp_path / "r").rows(0, "resid_post.0"), states.float().numpy())


def test_neither_writing_nor_reading_needs_torch(tmp_path: Path) -> None:
    written(tmp_path / "r")
    code = (
        "import sys; from lazarus import Recording; r = Recording.open(sys.argv[1]); "
        "print(r.rows(1, 'resid_post.0')[1, 3], 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["8.0", "False", "False"]


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ({"resid_post.0": np.zeros((2, 4), np.float32)}, r"\[3, 4\] is needed"),
        ({"resid_post.0": np.zeros((3, 5), np.float32)}, r"\[3, 4\] is needed"),
        ({"resid_post.0": np.zeros((3, 4), np.int8)}, "int8"),
        ({"layer_3": np.zeros((3, 4), np.float32)}, "'layer_3' is no site"),
        ({"resid_post.1": np.zeros((3, 4), np.float32)}, "has resid_post.1, and its model 1 blocks"),
        ({"resid_post.0": np.zeros((3, 4), np.int64)}, "type I64"),
        ({"logits": np.zeros((3, 0), np.float32)}, r"\[3, 1\] is needed"),
        ({"logits": np.zeros((), np.float32)}, r"\[3, 1\] is needed"),
        ({"top_ids": np.zeros((3, 2), np.int32)}, "belong together"),
        (
            {"top_ids": np.zeros((3, 2), np.int32), "top_logprobs": np.zeros((3, 2))},
            "one for all other tokens are needed: 3",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused_as_they_are_added(tmp_path: Path, states: Any, told: str) -> None:
    writer = Recording.create(tmp_path / "r", model="m", n_layers=1, hidden_size=4)
    with pytest.raises(UsageError, match=told):
        writer.add([1, 2, 3], states)


@pytest.mark.parametrize(
    "prompt",
    [
        {"ids": []},
        {"ids": [1, -2]},
        {"ids": [1, 2**31]},
        {"positions": [1, 0]},
        {"positions": [0, 0]},
        {"positions": [0, 2]},
        {"positions": []},
        {"text": "\ud800"},
    ],
    ids=str,
)
def test_a_prompt_that_could_not_be_read_back_is_refused_as_it_is_added(
    tmp_path: Path, prompt: dict[str, Any]
) -> None:
    writer = Recording.create(tmp_path / "r", model="m", n_layers=1, hidden_size=4)
    states = {"resid_post.0": np.zeros((2, 4), np.float32)}
    with pytest.raises(UsageError, match="prompt 0: "):
        writer.add(**({"ids": [1, 2], "states": states} | prompt))


def test_what_was_added_stays_when_the_caller_writes_over_it(tmp_path: Path) -> None:
    buffer = np.zeros((1, 4), np.float32)
    with Recording.create(tmp_path / "r", model="m", n_layers=1, hidden_size=4) as writer:
        for i in range(3):
            buffer[:] = i
            writer.add([1], {"resid_post.0": buffer})
    found = Recording.open(tmp_path / "r")
    assert [found.rows(i, "resid_post.0")[0, 0] for i in range(3)] == [0, 1, 2]


def test_every_prompt_has_the_same_sites(tmp_path: Path) -> None:
    writer = Recording.create(tmp_path / "r", model="m", n_layers=1, hidden_size=4)
    writer.add([1], {"resid_post.0": np.zeros((1, 4), np.float32)})
    with pytest.raises(UsageError, match="'embedding'"):
        writer.add([1], {"embedding": np.zeros((1, 4), np.float32)})


def test_an_empty_recording_and_a_folder_that_holds_something_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without a prompt"):
        Recording.create(tmp_path / "r", model="m", n_layers=1, hidden_size=4).close()
    written(tmp_path / "full")
    with pytest.raises(UsageError, match=r"holds '00000\.safetensors'"):
        Recording.create(tmp_path / "full", model="m", n_layers=1, hidden_size=4)
    with pytest.raises(UsageError, match="flavour has no place"):
        Recording.create(tmp_path / "odd", model="m", n_layers=1, hidden_size=4, flavour="salt")


# Damage


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "recording.json"
        found = json.loads(path.read_bytes())
        change(found)
        path.write_text(json.dumps(found), encoding="utf-8")

    return damage


def cut(folder: Path) -> None:
    path = folder / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_header(folder: Path) -> None:
    path = folder / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def lost(folder: Path) -> None:
    (folder / "00000.safetensors").unlink()


def longer_header(folder: Path) -> None:
    path = folder / "00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**60) + content[8:])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut, "asks for"),
    "cut in its header": (cut_in_header, "its header"),
    "lost a file": (lost, "cannot be read"),
    "a header that is too long": (longer_header, "its header has"),
    "of a later version": (edited(lambda r: r.update(version=2)), r"format version 2.*Update lazarus"),
    "of another format": (edited(lambda r: r.update(format="other")), "no recording, or a damaged one"),
    "other ids": (edited(lambda r: r["prompts"][0].update(ids=[1, 2, 9])), "changed after it was written"),
    "no checksum, prompts that are not numbered": (
        edited(lambda r: (r.update(checksum=None), r["prompts"][1].update(index=5))),
        "not numbered from 0",
    ),
    "no checksum, a file elsewhere": (
        edited(lambda r: (r.update(checksum=None), r["shards"][0].update(file="../00000.safetensors"))),
        "not in its folder",
    ),
    "no checksum, a file that no system has": (
        edited(lambda r: (r.update(checksum=None), r["shards"][0].update(file="a\0b"))),
        "not in its folder",
    ),
    "no checksum, more sites than blocks": (
        edited(lambda r: (r.update(checksum=None), r["sites"].append("resid_post.9"))),
        "has resid_post.9, and its model",
    ),
    "no checksum, a response elsewhere": (
        edited(lambda r: (r.update(checksum=None), r["prompts"][0].update(response=[[2, 2]]))),
        "its response is not among its",
    ),
    "no checksum, an id that is none": (
        edited(lambda r: (r.update(checksum=None), r["prompts"][0].update(ids=[1, 2, 2**40]))),
        "no recording, or a damaged one",
    ),
    "no checksum, more tokens": (
        edited(lambda r: (r.update(checksum=None), r["prompts"][0].update(ids=[1, 2, 3, 4]))),
        "has the shape",
    ),
    "no checksum, another site": (
        edited(lambda r: (r.update(checksum=None), r["sites"].append("final_norm"))),
        "lacks the tensor '0/final_norm'",
    ),
    "no checksum, another size": (
        edited(lambda r: (r.update(checksum=None), r["shards"][0].update(n_bytes=7))),
        "says 7",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_recording_is_refused_with_what_is_wrong(tmp_path: Path, kind: str) -> None:
    damage, told = DAMAGE[kind]
    damage(written(tmp_path / "r"))
    with pytest.raises(RecordingError, match=told):
        Recording.open(tmp_path / "r")


def test_whatever_bit_of_a_header_is_flipped_it_is_refused_or_says_the_same(tmp_path: Path) -> None:
    whole = Recording.open(written(tmp_path / "r"))
    expected = [whole.rows(i, site).tolist() for i in range(2) for site in whole.sites]
    n_refused = 0
    for name in ("recording.json", "00000.safetensors"):
        path = tmp_path / "r" / name
        content = path.read_bytes()
        length = 8 + struct.unpack("<Q", content[:8])[0] if name[0] == "0" else len(content)
        for place in range(length):
            damaged = bytearray(content)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            try:
                found = Recording.open(tmp_path / "r")
                rows = [found.rows(i, site).tolist() for i in range(2) for site in found.sites]
            except RecordingError:
                n_refused += 1
                continue
            assert rows == expected, (name, place)
            assert found.contents == whole.contents, (name, place)
        path.write_bytes(content)
    assert n_refused > 500


# The command line


def test_record_and_compare_on_the_command_line(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", tiny_llama(), word_tokenizer())
    other = save_model(tmp_path / "f", perturbed(tiny_llama()), word_tokenizer())
    run = CliRunner()
    arguments = ["introspect", "record", "-m", str(other), "-p", "t1 t2 t3,t5 t6", "-o", str(tmp_path / "r")]
    done = run.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"Loading model: {other}",
        "Recording 2 prompts",
        "",
        "Prompt: t1 t2 t3...",
        "Prompt: t5 t6...",
        "",
        "Recorded: 6 sites at 5 tokens of 2 prompts, computed in float32, 0.0 MB",
        f"Recording saved to: {tmp_path / 'r'}",
    ]
    done = run.invoke(app, ["introspect", "activation-diff", "-b", str(model), "-f", str(tmp_path / "r")])
    assert done.exit_code == 0, done.output
    assert "Testing 2 prompts\n\nPrompt: t1 t2 t3...\nPrompt: t5 t6...\n\nLayer " in done.stdout
    again = run.invoke(app, arguments)
    assert again.exit_code == 2
    assert "holds '00000.safetensors'" in again.stderr
    done = run.invoke(app, ["introspect", "activation-diff", "-b", str(model), "-f", str(other)])
    assert done.exit_code == 2
    assert "neither model is a recording" in done.stderr
