"""compare with a recording in place of a model: the numbers of two live models, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from architectures import CAUSAL, OF_EACH_KIND, REFUSED, UNBUILDABLE, WITHOUT_HEAD, build
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus import Recording, compare, record
from lazarus.demo import BASE, FINETUNED
from lazarus.engine import learn
from lazarus.errors import (
    PromptsError,
    RecordingError,
    ShapeMismatchError,
    TokenizerMismatchError,
    UnsupportedModelError,
    UsageError,
)
from lazarus.lens.reading import RecordedToken, read_recorded
from lazarus.models import wrap_model
from lazarus.recordings import Array
from lazarus.results import CompareRecord, LensModel
from reference import run_whole

PROMPT = "The answer is"
WORDS = "t64 t27 t50 t23 t8 t91 t36 t70 t19"
BY_CUTTING = {"inkling2_text", "inkling2_loop_text"}
READ = [name for name in CAUSAL if name not in {*UNBUILDABLE, *REFUSED, *WITHOUT_HEAD, *BY_CUTTING}]


def lens(model: LensModel) -> Any:
    """What a reader sees of a lens, and of the model no name."""
    return model.n_vocabulary, model.prompt_tokens, model.layers, model.tracked


def assert_same_numbers(found: CompareRecord, expected: CompareRecord) -> None:
    assert lens(found.model1) == lens(expected.model1)
    assert lens(found.model2) == lens(expected.model2)
    assert found.layers == expected.layers
    assert found.summary == expected.summary
    assert found.tracked == expected.tracked


@pytest.mark.parametrize("name", sorted(OF_EACH_KIND & {*READ}))
def test_a_recording_of_a_model_is_that_model(name: str, tmp_path: Path) -> None:
    model, tokenizer = build(name), word_tokenizer()
    recording = record(model, [WORDS], tmp_path / "r", tokenizer=tokenizer)
    live = compare(model, model, WORDS, tokenizer=tokenizer).record
    first = compare(tmp_path / "r", model, tokenizer=tokenizer).record
    assert_same_numbers(first, live)
    assert (first.model1.info.kind, first.model1.info.runtime is None) == ("recording", False)
    assert (first.model2.info.kind, first.position) == ("loaded", 8)
    assert all(pair.kl_1_2 == 0 for pair in first.layers)
    assert_end_reads_the_last_block(model, recording)


def assert_end_reads_the_last_block(model: Any, recording: Recording) -> None:
    """Read through the norm and the head, the last block gives the model's own logits."""
    ids, wrapped = recording.prompts[0].ids, wrap_model(model, "the model")
    n_layers = recording.contents.model.n_layers
    blocks = [torch.from_numpy(recording.rows(0, f"resid_post.{i}", len(ids) - 1)) for i in range(n_layers)]
    token = RecordedToken(blocks, None, None)
    read = read_recorded(wrapped, learn(wrapped, ids, 0), ids, token, lambda _: None)[-1]
    own = run_whole(model, list(ids)).logits[0, -1]
    assert (read - own).abs().max() <= 1e-5 * max(1.0, float(own.abs().max()))


def of_first(model: Any, folder: Path, **options: Any) -> Recording:
    return record(model, [PROMPT], folder, tokenizer=tiny_tokenizer(), **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("logits", [False, True])
def test_two_models_with_one_head_are_as_two_live_ones(dtype: str, logits: bool, tmp_path: Path) -> None:
    """Both orders; the type is that of the recording."""
    one, other = saved(tmp_path / "one", 0), saved_with_head_of_one(tmp_path / "other")
    record(
        other, [PROMPT, "What is AI?"], tmp_path / "r", dtype=dtype, logits=logits, top_k=0, position="last"
    )
    live = compare(one, other, PROMPT, dtype=dtype, top_k=3).record
    found = compare(one, tmp_path / "r", PROMPT, top_k=3).record
    assert found.settings.dtype == dtype
    # Two prompts in a batch are rounded otherwise than one.
    for pair, expected in zip(found.layers, live.layers, strict=True):
        assert pair.js == pytest.approx(expected.js, rel=2e-2 if dtype == "bfloat16" else 1e-3)
    turned = compare(tmp_path / "r", one, PROMPT, top_k=3).record
    assert (turned.model1.layers, turned.model2.layers) == (found.model2.layers, found.model1.layers)
    assert "recorded" in found.note_codes
    last = "its recorded logits" if logits else "its recorded state after its own final norm"
    assert any(f"the last one is {last}" in note for note in found.notes)


def saved(folder: Path, seed: int, **changes: Any) -> Path:
    return save_model(folder, tiny_llama(seed, **changes), tiny_tokenizer())


def saved_with_head_of_one(folder: Path) -> Path:
    one = tiny_llama(0)
    other = perturbed(one)
    other.lm_head.weight.data.copy_(one.lm_head.weight)
    return save_model(folder, other, tiny_tokenizer())


def test_the_last_layer_is_what_the_recorded_model_said(tmp_path: Path) -> None:
    """The two models of the demo have heads of their own: the logits are the recorded model's."""
    prompt = "Calculate 7 * 8:"
    live = compare(BASE, FINETUNED, prompt).record
    record(FINETUNED, [prompt], tmp_path / "r", logits=True, top_k=0, position="last")
    found = compare(BASE, tmp_path / "r").record
    assert found.prompt == prompt
    assert found.layers[-1] == live.layers[-1]
    assert found.model2.layers[-1] == live.model2.layers[-1]
    assert found.model1.layers == live.model1.layers
    # Through base's own norm and head, written out.
    states = Recording.open(tmp_path / "r").rows(0, "resid_post.3")
    logits = through_head_of(BASE, states[0])
    assert [t.token_id for t in found.model2.layers[3].top] == np.argsort(-logits)[:5].tolist()


def through_head_of(folder: Path, state: NDArray[np.float32]) -> NDArray[np.float64]:
    """The final norm (RMSNorm) and the LM head of a Llama, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    x = state.astype(np.float64)
    norm, head = model.model.norm.weight.detach().numpy(), model.lm_head.weight.detach().numpy()
    logits: NDArray[np.float64] = head @ (x / np.sqrt((x**2).mean() + model.config.rms_norm_eps) * norm)
    return logits


def test_another_depth_is_matched_as_two_live_models_are(tmp_path: Path) -> None:
    one, deeper = saved(tmp_path / "one", 0), saved(tmp_path / "deeper", 1, num_hidden_layers=6)
    record(deeper, [PROMPT], tmp_path / "r")
    live, found = compare(one, deeper, PROMPT).record, compare(one, tmp_path / "r").record
    assert [pair.model2_layer for pair in found.layers] == [pair.model2_layer for pair in live.layers]
    assert len(found.model2.layers) == 6
    assert "depths-differ" in found.note_codes


def test_layers_that_were_not_recorded_are_left_out(tmp_path: Path) -> None:
    """As of vLLM, which keeps the layers that it is told to."""
    model = saved(tmp_path / "m", 0)
    whole = record(model, [PROMPT], tmp_path / "whole")
    sites = {site: whole.rows(0, site) for site in ("resid_post.0", "resid_post.2")}
    rewrite(tmp_path / "some", whole, sites)
    found = compare(model, tmp_path / "some", PROMPT).record
    assert [bool(layer.top) for layer in found.model2.layers] == [True, False, True, False]
    assert [pair.js for pair in found.layers] == [0, None, 0, None]
    assert "not-finite" not in found.note_codes
    told = [note for note in found.notes if "has no states after blocks 1, 3 (2 of 4)" in note]
    assert len(told) == 1


def rewrite(folder: Path, whole: Recording, sites: Mapping[str, Array], **known: Any) -> None:
    """Write one prompt of a recording again, with these sites."""
    model = {"model": "other", "n_layers": 4, "hidden_size": 32, **known}
    with Recording.create(folder, **model) as writer:
        writer.add(whole.prompts[0].ids, sites, text=whole.prompts[0].text)


def test_logits_of_another_vocabulary_are_not_put_beside_those_of_the_head(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", 0)
    whole = record(model, [PROMPT], tmp_path / "whole", logits=True, top_k=0)
    sites = {site: whole.rows(0, site) for site in whole.sites}
    sites["logits"] = np.pad(sites["logits"], ((0, 0), (0, 2)))
    rewrite(tmp_path / "longer", whole, sites)
    found = compare(model, tmp_path / "longer", PROMPT).record
    assert found.layers[-1].js == 0
    assert any("its logits are of 302 tokens, not 300" in note for note in found.notes)


# What is refused.


def test_two_recordings_have_no_head(tmp_path: Path) -> None:
    of_first(tiny_llama(), tmp_path / "r")
    with pytest.raises(UsageError, match=r"are recordings, and compare reads.*Name the model"):
        compare(tmp_path / "r", tmp_path / "r")


def test_a_prompt_that_was_not_recorded_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    record(model, ["What is AI?", PROMPT], tmp_path / "r", tokenizer=tokenizer)
    with pytest.raises(RecordingError, match=r"the nearest of 2, prompt 1 has no token at token \d, and the"):
        compare(model, tmp_path / "r", f"{PROMPT} 42", tokenizer=tokenizer)
    with pytest.raises(UsageError, match=r"has 2 prompts, and compare takes one.*as the prompt"):
        compare(model, tmp_path / "r", tokenizer=tokenizer)
    assert compare(model, tmp_path / "r", PROMPT, tokenizer=tokenizer).record.prompt == PROMPT


def test_a_last_token_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    of_first(tiny_llama(), tmp_path / "r", position="0")
    with pytest.raises(RecordingError, match=r"no states of the last token of prompt 0, which is \d.*of 0\."):
        compare(tiny_llama(), tmp_path / "r", tokenizer=tiny_tokenizer())


def test_ids_that_the_tokenizer_does_not_give_are_refused(tmp_path: Path) -> None:
    of_first(tiny_llama(), tmp_path / "r")
    with pytest.raises(TokenizerMismatchError, match=r"Prompt 0.*At token \d the recording has"):
        compare(tiny_llama(), tmp_path / "r", tokenizer=tiny_tokenizer(280))


def test_another_width_is_refused(tmp_path: Path) -> None:
    of_first(tiny_llama(hidden_size=64), tmp_path / "r")
    with pytest.raises(ShapeMismatchError, match=r"states of 64 features.*read 32"):
        compare(tiny_llama(), tmp_path / "r", tokenizer=tiny_tokenizer())


def test_an_end_that_reads_earlier_blocks_is_refused(tmp_path: Path) -> None:
    model, tokenizer = build("inkling2_text"), word_tokenizer()
    record(model, [WORDS], tmp_path / "r", tokenizer=tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"reads more than the last block.*both are read live"):
        compare(model, tmp_path / "r", tokenizer=tokenizer)


def test_the_parting_of_a_recording_is_not_looked_for(tmp_path: Path) -> None:
    of_first(tiny_llama(), tmp_path / "r")
    with pytest.raises(UsageError, match=r"`at=.parting.` needs what both models say after every token"):
        compare(tiny_llama(), tmp_path / "r", PROMPT, tokenizer=tiny_tokenizer(), at="parting")


def test_without_a_recording_a_prompt_is_needed() -> None:
    with pytest.raises(PromptsError, match="No prompt: neither model is a recording"):
        compare(BASE, FINETUNED)
