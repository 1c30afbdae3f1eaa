"""series: members against one base, with the numbers of the pairwise runs, and what they show together."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from lazarus import ActivationDiff, Recording, Series, activation_diff, load_result, record, series
from lazarus.engine.runner import Runner
from lazarus.errors import GateNotMetError, PromptsError, UsageError

PROMPTS = ["The answer is", "one two three four five", "The answer is not", "Why?", "The answer is"]
N_MEMBERS = 6


def train(folder: Path, n_members: int = N_MEMBERS) -> Path:
    """A run of training: a random walk from a tiny Llama, its checkpoints 100, 200, …, 1000 and more."""
    base = tiny_llama()
    save_model(folder / "base", base, tiny_tokenizer())
    for i in range(n_members):
        base = perturbed(base, amount=0.02, seed=i + 1)
        save_model(folder / f"checkpoint-{100 * (i + 5)}", base, tiny_tokenizer())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    return train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def found(run: Path) -> Series:
    """A series of its checkpoints."""
    return series(run / "base", str(run / "checkpoint-*"), PROMPTS)


def same(member: int, found: Series, pairwise: ActivationDiff) -> None:
    """Hold a member's numbers against those of a run of its own, bit for bit."""
    ours, theirs = found.members[member], pairwise.record
    assert ours.model == theirs.finetuned
    assert ours.layers == theirs.layers
    assert ours.sites == theirs.sites
    assert ours.output == theirs.output
    assert ours.summary == theirs.summary


def test_checkpoints_come_in_natural_order_with_their_steps(found: Series) -> None:
    assert [member.step for member in found.members] == [500, 600, 700, 800, 900, 1000]
    assert [Path(member.model.id).name for member in found.members][-1] == "checkpoint-1000"


def test_the_numbers_are_those_of_the_pairwise_runs(run: Path, found: Series) -> None:
    for i, member in enumerate(found.members):
        same(i, found, activation_diff(run / "base", member.model.id, PROMPTS))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"position": "mean"},
        {"position": "all"},
        {"no_noise_floor": True},
        {"batch_tokens": 8},
        {"memory": "stream"},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_the_numbers_are_those_of_the_pairwise_runs_with(run: Path, options: dict[str, Any]) -> None:
    names = [str(run / "checkpoint-500"), str(run / "checkpoint-700"), str(run / "base")]
    found = series(run / "base", names, PROMPTS, **options)
    for i, name in enumerate(names):
        same(i, found, activation_diff(run / "base", name, PROMPTS, token_prompts="none", **options))


def test_prompts_with_a_common_prefix_are_those_of_the_pairwise_runs(run: Path) -> None:
    prompts = [f"a long beginning that all prompts have {i}" for i in range(8)]
    names = [str(run / "checkpoint-500"), str(run / "checkpoint-600")]
    found = series(run / "base", names, prompts)
    for i, name in enumerate(names):
        same(i, found, activation_diff(run / "base", name, prompts))


def test_adapters_and_models_that_share_blocks_are_those_of_the_pairwise_runs(
    run: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    half = tiny_llama()
    with torch.no_grad():
        half.model.layers[-1].mlp.down_proj.weight += 0.01
    save_model(tmp_path / "half", half, tiny_tokenizer())
    members = [tmp_path / "adapter", tmp_path / "half", run / "checkpoint-500"]
    found = series(run / "base", members, PROMPTS)
    for i, member in enumerate(members):
        same(i, found, activation_diff(run / "base", member, PROMPTS))


def test_a_base_with_an_adapter_and_models_in_memory_are_those_of_the_pairwise_runs(
    run: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    base = f"{run / 'base'}+{tmp_path / 'adapter'}"
    members = [str(run / "checkpoint-500"), perturbed(tiny_llama())]
    found = series(base, members, PROMPTS)
    for i, member in enumerate(members):
        same(i, found, activation_diff(base, member, PROMPTS))


def test_a_recording_is_a_member_and_a_base(run: Path, tmp_path: Path, found: Series) -> None:
    for name in ("base", "checkpoint-600"):
        record(run / name, PROMPTS, tmp_path / name, logits=True, top_k=0)
    members = [run / "checkpoint-500", tmp_path / "checkpoint-600", run / "checkpoint-700"]
    mixed = series(run / "base", members, PROMPTS)
    np.testing.assert_allclose(mixed.distances, found.distances[:3, :3], rtol=1e-6)
    same(1, mixed, activation_diff(run / "base", members[1], PROMPTS))
    recorded = series(tmp_path / "base", members)
    np.testing.assert_allclose(recorded.distances, found.distances[:3, :3], rtol=1e-6)


def test_base_runs_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    plain = Runner.run

    def counted(self: Runner, *arguments: Any) -> Any:
        names.append(Path(self.model.name).name)
        return plain(self, *arguments)

    monkeypatch.setattr(Runner, "run", counted)
    series(run / "base", str(run / "checkpoint-*"), PROMPTS, no_noise_floor=True)
    assert names.count("base") == 1
    assert len(names) == 1 + N_MEMBERS


def test_each_is_compared_with_the_one_before_it(run: Path, found: Series) -> None:
    assert found.members[0].previous is None
    before = found.members[2].previous
    pairwise = activation_diff(run / "checkpoint-600", run / "checkpoint-700", PROMPTS)
    assert before is not None
    assert before.divergence == pairwise.summary.max_divergence
    assert before.layer == pairwise.summary.most_divergent_layer
    assert pairwise.record.output is not None
    assert before.kl == pytest.approx(pairwise.record.output.kl_base_finetuned, rel=1e-12)
    assert before.verdict == "changed"


def test_distances_are_those_of_the_states(run: Path, found: Series) -> None:
    pair = activation_diff(run / "base", run / "checkpoint-500", PROMPTS[:1])
    alone = series(run / "base", [run / "checkpoint-500"], PROMPTS[:1])
    # Of one prompt and one token, relative L2 is ‖x − b‖ / ‖b‖.
    squares = [layer.relative_l2**2 for layer in pair.layers if layer.relative_l2 is not None]
    assert alone.members[0].distance == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-6)
    assert np.array_equal(found.distances, found.distances.T)
    assert not np.diag(found.distances).any()
    assert (np.diff(found.distances[0]) > 0).all()


def copy(run: Path, to: Path, name: str, *, of: str) -> None:
    """Put a copy of a checkpoint in the place of another."""
    shutil.rmtree(to / name)
    shutil.copytree(run / of, to / name)


@pytest.fixture
def spoilt(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def kinds(found: Series) -> list[tuple[str, Sequence[int]]]:
    return [(finding.kind, finding.members) for finding in found.findings]


def test_a_clean_run_has_no_findings(found: Series) -> None:
    assert found.findings == []
    assert "Findings: none" in str(found)


@pytest.mark.parametrize(
    ("name", "of", "kind", "members"),
    [
        ("checkpoint-800", "checkpoint-700", "duplicate", [2, 3]),
        ("checkpoint-600", "checkpoint-1000", "same_as_last", [1]),
        ("checkpoint-500", "base", "same_as_base", [0]),
    ],
)
def test_a_copy_is_found(
    run: Path, spoilt: Path, name: str, of: str, kind: str, members: Sequence[int]
) -> None:
    copy(run, spoilt, name, of=of)
    found = series(spoilt / "base", str(spoilt / "checkpoint-*"), PROMPTS)
    assert kinds(found) == [(kind, members)]
    with pytest.raises(GateNotMetError, match="expect_path"):
        found.check_gates(expect_path=True)


def test_members_that_were_swapped_are_found(run: Path, spoilt: Path) -> None:
    copy(run, spoilt, "checkpoint-700", of="checkpoint-800")
    copy(run, spoilt, "checkpoint-800", of="checkpoint-700")
    found = series(spoilt / "base", str(spoilt / "checkpoint-*"), PROMPTS)
    ((kind, members),) = kinds(found)
    assert kind == "out_of_order"
    assert set(members) <= {2, 3}


def test_a_first_shard_of_the_one_before_is_found(run: Path, spoilt: Path) -> None:
    model, other = tiny_llama(), tiny_llama()
    for loaded, name in ((model, "checkpoint-800"), (other, "checkpoint-700")):
        loaded.load_state_dict(type(loaded).from_pretrained(run / name).state_dict())
    model.model.embed_tokens.load_state_dict(other.model.embed_tokens.state_dict())
    model.model.layers[0].load_state_dict(other.model.layers[0].state_dict())
    save_model(spoilt / "checkpoint-800", model, tiny_tokenizer())
    found = series(spoilt / "base", str(spoilt / "checkpoint-*"), PROMPTS)
    assert kinds(found) == [("same_first_blocks", [2, 3])]
    assert "the first block of" in found.findings[0].text


def test_a_run_that_was_interrupted_goes_on(run: Path, tmp_path: Path, found: Series) -> None:
    names = [member.model.id for member in found.members]
    series(run / "base", names[:2], PROMPTS, work_dir=str(tmp_path / "work"))
    (tmp_path / "work" / "00001.json").unlink()  # as if it had been stopped there
    again = series(run / "base", names, PROMPTS, work_dir=str(tmp_path / "work"))
    assert again.members == found.members
    assert again.record.distances == found.record.distances
    with pytest.raises(UsageError, match="another run"):
        series(run / "base", names, PROMPTS[:2], work_dir=str(tmp_path / "work"))


def test_of_recordings_nothing_is_taken_from_an_earlier_run(run: Path, tmp_path: Path) -> None:
    names = [str(run / f"checkpoint-{step}") for step in (500, 600, 700)]
    recorded = [tmp_path / f"{i}" for i in range(3)]
    for name, folder in zip(names, recorded, strict=True):
        record(name, PROMPTS, folder)
    work = str(tmp_path / "work")
    for base in recorded[:2]:
        found = series(base, [recorded[2]], work_dir=work)
        assert found.record.distances == series(base, [recorded[2]]).record.distances
        assert found.members == series(base, [recorded[2]]).members
    mixed = series(run / "base", [recorded[2], *names[:2]], PROMPTS, work_dir=work)
    assert mixed.members == series(run / "base", [recorded[2], *names[:2]], PROMPTS).members
    with pytest.raises(UsageError, match="recording before it"):
        series(run / "base", [recorded[0], *names[:2]], PROMPTS, work_dir=work)


def test_distances_do_not_depend_on_a_recording_that_lacks_layers(run: Path, tmp_path: Path) -> None:
    names = [str(run / "checkpoint-500"), str(run / "checkpoint-600")]
    whole = record(names[0], PROMPTS, tmp_path / "whole")
    with Recording.create(tmp_path / "part", model="m", n_layers=4, hidden_size=32) as part:
        for prompt in whole.prompts:
            part.add(prompt.ids, {"resid_post.1": whole.rows(prompt.index, "resid_post.1")})
    found = series(run / "base", [tmp_path / "part", *names], PROMPTS)
    expected = series(run / "base", names, PROMPTS)
    assert [member.distance for member in found.members[1:]] == [m.distance for m in expected.members]
    assert found.members[0].distance is None


def test_rounding_to_another_type_is_no_change_of_a_member(run: Path, tmp_path: Path) -> None:
    record(run / "base", PROMPTS, tmp_path / "r", dtype="bfloat16")
    found = series(run / "base", [tmp_path / "r", run / "base"], PROMPTS)
    assert [member.summary.verdict for member in found.members] == ["identical", "identical"]
    assert found.members[1].previous is not None
    assert found.members[1].previous.verdict is None
    assert any("ran in bfloat16 and float32" in note for note in found.notes)


def test_a_model_of_more_tokens_is_not_base(run: Path, tmp_path: Path) -> None:
    base = tiny_llama()
    save_model(tmp_path / "padded", base, tiny_tokenizer())
    torch.manual_seed(1)
    base.resize_token_embeddings(320, mean_resizing=False)
    save_model(tmp_path / "longer", base, tiny_tokenizer())
    found = series(tmp_path / "padded", str(tmp_path / "longer"), PROMPTS)
    assert found.members[0].distance == 0
    assert (found.members[0].summary.verdict, found.findings) == ("changed", [])


def test_a_result_is_saved_read_back_and_held_against_gates(found: Series, tmp_path: Path) -> None:
    found.save(tmp_path / "series.json")
    again = load_result(tmp_path / "series.json")
    assert isinstance(again, Series)
    assert again.record == found.record
    again.check_gates(expect="changed", expect_path=True)
    with pytest.raises(GateNotMetError, match=r"checkpoint-500: .*expect"):
        again.check_gates(expect="identical")
    assert len(again.to_pandas()) == sum(len(member.layers) for member in again.members)
    assert again.with_threshold(0.0).members[0].summary.n_flagged_layers == len(again.members[0].layers)


def test_what_cannot_be_a_series_is_a_usage_error(run: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing-\*.*no model matches"):
        series(run / "base", str(run / "nothing-*"), PROMPTS)
    with pytest.raises(UsageError, match="at least one model"):
        series(run / "base", [], PROMPTS)
    with pytest.raises(PromptsError, match="No prompt"):
        series(run / "base", str(run / "checkpoint-*"))


def test_steps_that_do_not_ascend_are_noted(run: Path) -> None:
    names = [run / "checkpoint-600", run / "checkpoint-500"]
    assert "steps-not-in-order" in series(run / "base", names, PROMPTS).note_codes
