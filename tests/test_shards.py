"""A run in several goes and by several processes: the numbers of one that ran alone, nothing run twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer, word_tokenizer
from lazarus.cli import app
from lazarus.demo import BASE, FINETUNED, PROMPTS
from lazarus.errors import SaveError, UsageError
from lazarus.loading import pick_device
from lazarus.metrics import (
    AccumulatorState,
    CkaRows,
    Directions,
    PromptMeans,
    Rows,
    RowValues,
    SiteMeasures,
    SitePlan,
)
from lazarus.ranks import Rank, find_rank
from lazarus.shards import Shard, WorkFolder, run_shards, states

TEXTS = [
    {"prompt": " ".join(f"t{3 + (11 * i + 5 * k * k) % 90}" for k in range(1 + i % 9)), "group": f"g{i % 2}"}
    for i in range(64)
]
FEW = ["t5 t17 t80", "t9 t33", "t12 t77 t31 t8 t9", "t64"]
FOUND_ANEW = ("created", "notes", "note_codes", "environment")


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    base = tiny_llama()
    return base, perturbed(base)


def compare(models: Any, texts: Any = FEW, **options: Any) -> lazarus.ActivationDiff:
    base, finetuned = models
    options = {"batch_tokens": 16, "localize": True, **options}
    return lazarus.activation_diff(base, finetuned, texts, tokenizer=word_tokenizer(), **options)


def numbers(diff: lazarus.ActivationDiff, folder: Path) -> Any:
    """The whole JSON of a result, but for what is found anew in each run."""
    path = folder.with_name(f"{folder.name}-numbers.json")
    diff.save(path)
    return numbers_of(path)


def numbers_of(path: Path) -> Any:
    found = json.loads(path.read_bytes())
    found["settings"].pop("work_dir")
    return {name: value for name, value in found.items() if name not in FOUND_ANEW}


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12), where
    else:
        assert found == expected, where


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.npz"))


# The numbers


@pytest.mark.parametrize("position", ["last", "all"])
def test_in_shards_the_numbers_are_those_of_a_run_in_one_go(
    models: Any, tmp_path: Path, position: str
) -> None:
    options = {"texts": [*TEXTS, *TEXTS[:5]], "position": position, "readout": "auto"}
    whole = numbers(compare(models, **options), tmp_path / "whole")
    shared = numbers(compare(models, **options, work_dir=str(tmp_path / "work")), tmp_path / "work")
    assert len(shard_files(tmp_path / "work")) > 5
    assert whole["layers"][0]["cka"] is not None
    assert whole["layers"][0]["local"] is not None
    assert whole["groups"]["contrasts"]
    assert_same(shared, whole)


def test_models_of_other_widths_are_shared_as_well(tmp_path: Path) -> None:
    pair = tiny_llama(), tiny_llama(hidden_size=48, num_hidden_layers=6)
    whole = compare(pair, TEXTS, localize=False)
    shared = compare(pair, TEXTS, localize=False, work_dir=str(tmp_path / "work"))
    assert [layer.cka for layer in shared.layers] == [layer.cka for layer in whole.layers]
    assert whole.layers[0].cka is not None


def test_the_settings_name_the_folder(models: Any, tmp_path: Path) -> None:
    assert compare(models).record.settings.work_dir is None
    assert compare(models, work_dir=str(tmp_path)).record.settings.work_dir == str(tmp_path)


# Going on


def test_what_is_there_is_not_run_again(models: Any, tmp_path: Path) -> None:
    first = compare(models, work_dir=str(tmp_path / "work"))
    files = shard_files(tmp_path / "work")
    assert "shards-reused" not in first.note_codes
    files[1].unlink()
    times = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    again = compare(models, work_dir=str(tmp_path / "work"))
    n_before = len(files) - 1
    assert f"{n_before} of {len(files)} shards were already in {tmp_path / 'work'}" in again.notes
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert shard_files(tmp_path / "work") == files
    assert_same(numbers(again, tmp_path / "again"), numbers(first, tmp_path / "first"))


def test_a_run_that_is_interrupted_goes_on_where_it_was(models: Any, tmp_path: Path) -> None:
    class Interrupting:
        """Told of the third batch, it is the user's Ctrl-C."""

        n_told, total, done = 0, 0, 0

        def loading(self, *_: Any) -> None: ...
        def testing(self, *_: Any) -> None: ...

        def running(self, n_tokens: int) -> None:
            self.total = n_tokens

        def advanced(self, n_tokens: int) -> None:
            self.done += n_tokens
            self.n_told += n_tokens > 0
            if self.n_told == 3:
                raise KeyboardInterrupt

    options = {"texts": TEXTS[:20], "work_dir": str(tmp_path / "work")}
    with pytest.raises(KeyboardInterrupt):
        compare(models, observer=Interrupting(), **options)
    assert len(shard_files(tmp_path / "work")) == 2
    watcher = Interrupting()
    watcher.n_told = 3
    again = compare(models, observer=watcher, **options)
    assert watcher.done == watcher.total > 0
    assert any(note.startswith("2 of ") and "were already in" in note for note in again.notes)
    assert_same(numbers(again, tmp_path / "again"), numbers(compare(models, TEXTS[:20]), tmp_path / "whole"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    found = bytearray(path.read_bytes())
    found[len(found) // 3] ^= 255
    path.write_bytes(found)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    np.savez(path, sums=np.zeros(3))


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _foreign])
def test_a_damaged_shard_is_run_again(models: Any, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    whole = numbers(compare(models, work_dir=str(tmp_path / "work")), tmp_path / "whole")
    damage(shard_files(tmp_path / "work")[1])
    again = compare(models, work_dir=str(tmp_path / "work"))
    assert_same(numbers(again, tmp_path / "again"), whole)
    n = len(shard_files(tmp_path / "work"))
    assert f"{n - 1} of {n} shards were already in {tmp_path / 'work'}" in again.notes


def test_whatever_byte_is_changed_a_shard_is_whole_or_run_again(tmp_path: Path) -> None:
    folder = WorkFolder.open(str(tmp_path), Rank())
    state = {"sums": np.arange(6.0).reshape(2, 3), "n_rows": np.arange(2)}
    folder.write(0, state)
    (path,) = shard_files(tmp_path)
    written = path.read_bytes()
    for place in range(len(written)):
        changed = bytearray(written)
        changed[place] ^= 255
        path.write_bytes(changed)
        found = folder.read(0)
        if found is not None and found.keys() == state.keys():
            for name, array in state.items():
                np.testing.assert_array_equal(found[name], array)


# What a folder refuses


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "other prompts": ({"texts": [*FEW[:-1], "t65"]}, "base prompts was"),
    "more prompts": ({"texts": [*FEW, "t65"]}, "n_prompts was 4, is 5"),
    "another position": ({"position": "mean"}, "position was last, is mean"),
    "no local change": ({"localize": False}, "localize was True, is False"),
    "another batch": ({"batch_tokens": 32}, "batch_tokens was 16, is 32"),
    "another seed": ({"seed": 3}, "seed was 0, is 3"),
    "no noise": ({"no_noise_floor": True}, "no_noise_floor was False, is True"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_run_is_refused_with_what_differs(models: Any, tmp_path: Path, kind: str) -> None:
    changes, told = REFUSED[kind]
    compare(models, work_dir=str(tmp_path / "work"))
    before = {path: path.read_bytes() for path in (tmp_path / "work").iterdir()}
    with pytest.raises(UsageError) as refused:
        compare(models, work_dir=str(tmp_path / "work"), **changes)
    assert told in str(refused.value)
    assert str(refused.value).endswith("Give another `work_dir`, or delete this one.")
    assert {path: path.read_bytes() for path in (tmp_path / "work").iterdir()} == before


def test_what_changes_no_number_of_a_shard_may_differ(models: Any, tmp_path: Path) -> None:
    compare(models, work_dir=str(tmp_path / "work"))
    otherwise: dict[str, Any] = {"threshold": 0.5, "readout": "1", "position": "last", "anonymous": True}
    again = compare(models, work_dir=str(tmp_path / "work"), only_compared=True, **otherwise)
    assert again.record.readout is not None
    assert any("were already in" in note for note in again.notes)


def test_another_model_is_refused(models: Any, tmp_path: Path) -> None:
    compare(models, work_dir=str(tmp_path / "work"))
    other = models[0], perturbed(models[0], seed=2)
    with pytest.raises(UsageError, match=r"finetuned weights was .*, is "):
        compare(other, work_dir=str(tmp_path / "work"))


def test_files_that_were_written_again_are_another_model(models: Any, tmp_path: Path) -> None:
    base, finetuned = (
        save_model(tmp_path / n, m, tiny_tokenizer()) for n, m in zip("bf", models, strict=True)
    )

    def run() -> lazarus.ActivationDiff:
        return lazarus.activation_diff(base, finetuned, ["Hello", "What"], work_dir=str(tmp_path / "work"))

    run()
    assert any("were already in" in note for note in run().notes)
    save_model(finetuned, perturbed(models[0], seed=3))
    with pytest.raises(UsageError, match=r"model\.safetensors of .* was [0-9a-f]{64}, is"):
        run()


def test_a_folder_of_something_else_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex', and is no folder of a run"):
        lazarus.activation_diff("no/such-model", "no/such-model", FEW, work_dir=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["file/work", "file", "a\0b"])
def test_a_folder_that_cannot_be_is_refused_before_anything_is_loaded(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written: .*Choose another folder"):
        lazarus.activation_diff("no/such-model", "no/such-model", FEW, work_dir=str(tmp_path / place))


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(UsageError, match="`work_dir` is empty"):
        lazarus.activation_diff("no/such-model", "no/such-model", FEW, work_dir="")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", "[" * 100_000),
        *(f'{{"fingerprint": {{}}, "most_shards": {most}}}' for most in ('"x"', "0", "-3", "9" * 5000)),
    ],
)
def test_a_damaged_manifest_is_refused_before_anything_is_loaded(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=r"manifest\.json cannot be read: .*Give another `work_dir`"):
        lazarus.activation_diff("no/such-model", "no/such-model", FEW, work_dir=str(tmp_path))


# The folder


def test_many_processes_have_more_shards_and_the_first_says_how_many(tmp_path: Path) -> None:
    first, later = (WorkFolder.open(str(tmp_path), Rank(0, world)) for world in (100, 1))
    first.begin({})
    later.begin({})
    assert first.most_shards == later.most_shards == 800


def test_a_claim_is_held_by_one_alone_and_free_afterwards(tmp_path: Path) -> None:
    one, other = (WorkFolder.open(str(tmp_path), Rank(i, 2)) for i in range(2))
    with one.claimed(3) as ours, other.claimed(3) as theirs, other.claimed(4) as another:
        assert (ours, theirs, another) == (True, False, True)
    with other.claimed(3) as theirs:
        assert theirs


def test_a_disk_that_gives_out_is_told_and_leaves_no_half_of_a_shard(tmp_path: Path) -> None:
    folder = WorkFolder.open(str(tmp_path / "work"), Rank())
    (tmp_path / "work" / "shard-0000.npz.part").symlink_to("/dev/full")
    with pytest.raises(SaveError, match=r"shard-0000\.npz could not be written: No space left"):
        folder.write(0, {"sums": np.zeros(3)})
    assert folder.read(0) is None
    folder.write(0, {"sums": np.zeros(3)})
    assert folder.read(0) is not None


def test_each_process_begins_at_a_place_of_its_own(tmp_path: Path) -> None:
    shards = [Shard(i, [i], 10) for i in range(6)]
    ran: list[list[int]] = []
    for rank in (Rank(1, 2), Rank(0, 2)):
        folder = WorkFolder.open(str(tmp_path / str(rank.number)), rank)
        own: list[int] = []

        def run(shard: Shard, own: list[int] = own) -> AccumulatorState:
            own.append(shard.number)
            return {"sums": np.full(2, shard.number)}

        assert run_shards(folder, shards, run, lambda _: None) == 0
        ran.append(own)
        assert [state["sums"][0] for state in states(folder, shards)] == list(range(6))
    assert ran == [[3, 4, 5, 0, 1, 2], [0, 1, 2, 3, 4, 5]]


# Which process this is


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank(0, 1, 0)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Rank(2, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Rank(0, 1, 0)),
        ({"RANK": "3"}, Rank(0, 1, 0)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, Rank(5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Rank(0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Rank(1, 2, 0)),
    ],
)
def test_the_launchers_are_understood(environment: dict[str, str], expected: Rank) -> None:
    assert find_rank(environment) == expected


@pytest.mark.parametrize("environment", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_an_environment_that_makes_no_sense_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="WORLD_SIZE=2"):
        find_rank(environment)


@pytest.mark.parametrize(("given", "taken"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:3", "cuda:3")])
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(
    given: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert str(pick_device(given, Rank(9, 16, 1))) == taken


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, [*COMMAND, "-o", "x.json"])
    assert result.exit_code == 2
    assert "one of 2 processes" in result.stderr
    assert "--work-dir DIR" in result.stderr
    assert result.stdout == ""


# Several processes

COMMAND = ["introspect", "activation-diff", "-b", str(BASE), "-f", str(FINETUNED), "-p", f"@{PROMPTS}"]
SMALL = ["--batch-tokens", "16", "--localize"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The numbers of one process without a folder."""
    path = tmp_path_factory.mktemp("alone") / "x.json"
    _start(path.parent, "-o", "x.json").communicate()
    return numbers_of(path)


def _start(folder: Path, *arguments: str, rank: int | None = None, world: int = 2) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    ranks = {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen(
        [sys.executable, "-m", "lazarus", *COMMAND, *SMALL, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **ranks},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts commands; none is left when the test ends."""
    running: list[subprocess.Popen[str]] = []

    def call(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        running.append(_start(*arguments, **options))
        return running[-1]

    yield call
    for process in running:
        process.kill()
        process.communicate()


Start = Callable[..., "subprocess.Popen[str]"]


def test_two_processes_give_what_one_gives(start: Start, tmp_path: Path, alone: Any) -> None:
    gate = ("--fail-above", "0.0001")
    both = [start(tmp_path, "--work-dir", "w", "-o", f"{i}.json", *gate, rank=i) for i in range(2)]
    (told, faults), (silent, no_faults) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [3, 0]
    assert "--fail-above 0.0001" in faults
    assert told.endswith("Results saved to: 0.json\n")
    assert (silent, no_faults) == ("", "")
    assert not (tmp_path / "1.json").exists()
    found = numbers_of(tmp_path / "0.json")
    found["settings"]["fail_above"] = None
    assert_same(found, alone)


def test_the_library_gives_every_process_the_result(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = numbers(compare(models), tmp_path / "whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        found = compare(models, work_dir=str(tmp_path / "work"))
        assert_same(numbers(found, tmp_path / rank), whole)


def _wait_for_shards(folder: Path, process: subprocess.Popen[str], n_shards: int = 1) -> None:
    while len(shard_files(folder)) < n_shards:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_when_one_of_two_is_killed_the_other_finishes(start: Start, tmp_path: Path, alone: Any) -> None:
    killed = start(tmp_path, "--work-dir", "w", rank=1)
    _wait_for_shards(tmp_path / "w", killed)
    killed.send_signal(signal.SIGSTOP)  # in the middle of a shard, whose lock it holds
    other = start(tmp_path, "--work-dir", "w", "-o", "x.json", rank=0)
    _wait_for_shards(tmp_path / "w", other, len(shard_files(tmp_path / "w")) + 3)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    told, faults = other.communicate()
    assert other.returncode == 0, told + faults
    assert_same(numbers_of(tmp_path / "x.json"), alone)


def test_one_that_was_killed_goes_on_where_it_was(start: Start, tmp_path: Path, alone: Any) -> None:
    killed = start(tmp_path, "--work-dir", "w", "-o", "x.json")
    _wait_for_shards(tmp_path / "w", killed)
    killed.kill()
    killed.wait()
    before = {path: path.stat().st_mtime_ns for path in shard_files(tmp_path / "w")}
    again = start(tmp_path, "--work-dir", "w", "-o", "x.json")
    told, faults = again.communicate()
    assert again.returncode == 0, faults
    assert f"{len(before)} of {len(shard_files(tmp_path / 'w'))} shards were already in w" in told
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same(numbers_of(tmp_path / "x.json"), alone)


def test_torchrun_starts_it(tmp_path: Path, alone: Any) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "lazarus", *COMMAND, *SMALL, "--work-dir", "w", "-o", "x.json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Layer    Avg Cos Sim") == 1
    assert_same(numbers_of(tmp_path / "x.json"), alone)


# The states of the accumulators

Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _seen(seed: int, prompts: list[int], finetuned_width: int = 6) -> Seen:
    """Rows of some prompts, one of them not finite."""
    random = torch.Generator().manual_seed(seed)
    index = torch.tensor(prompts)
    base = torch.randn(len(prompts), 6, generator=random)
    finetuned = torch.randn(len(prompts), finetuned_width, generator=random)
    finetuned[0, 0] = torch.inf
    return index, base, finetuned


def _means(seen: Seen | None = None) -> PromptMeans:
    made = PromptMeans(("a", "b", "c", "d"), 9)
    if seen is not None:
        values = seen[1][:, :4].double()
        made.update(seen[0], RowValues(values, values[:, 0] > -1))
    return made


def _directions(seen: Seen | None = None) -> Directions:
    made = Directions()
    if seen is not None:
        made.update(seen[0], Rows.of(seen[1], seen[2]))
    return made


def _kept(seen: Seen | None = None) -> CkaRows:
    made = CkaRows({prompt: place for place, prompt in enumerate((0, 2, 3, 5, 8))})
    if seen is not None:
        made.update(*seen)
    return made


def _site(seen: Seen | None = None) -> SiteMeasures:
    made = SiteMeasures(SitePlan(9, centered=True, kept={0: 0, 3: 1, 5: 2}, traced={0, 4, 7}))
    if seen is not None:
        made.update(*seen, local=seen[1] + 1)
    return made


PARTS = (_seen(1, [0, 0, 3, 4]), _seen(2, [5, 7, 7]), _seen(3, [8]))


@pytest.mark.parametrize("make", [_means, _directions, _kept, _site])
@pytest.mark.parametrize("n_parts", [0, 1, 3])
def test_what_is_written_and_read_back_is_what_was_seen(
    make: Callable[..., Any], n_parts: int, tmp_path: Path
) -> None:
    """Bit for bit against the states that never leave the memory."""
    folder = WorkFolder.open(str(tmp_path), Rank())
    found, expected = make(), make()
    for number, seen in enumerate(PARTS[:n_parts]):
        folder.write(number, make(seen).state())
        read = folder.read(number)
        assert read is not None
        found.add(read)
        expected.add(make(seen).state())
    assert found.state().keys() == expected.state().keys()
    for name, array in expected.state().items():
        assert found.state()[name].dtype == array.dtype
        np.testing.assert_array_equal(found.state()[name], array)


def test_a_state_holds_only_the_prompts_that_were_seen() -> None:
    assert _means(PARTS[1]).state()["prompts"].tolist() == [5, 7]
    assert _kept(PARTS[1]).state()["base"].shape == (1, 6)
    assert _kept(PARTS[1]).state()["base"].dtype == np.float32
