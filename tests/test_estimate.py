"""Estimates: what is counted is exact, and no weight of a checkpoint is read. No test is of a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import save_adapter, save_gguf
from lazarus import Estimate, activation_diff, estimate_record, estimate_run, estimate_series, record, series
from lazarus.activation.measure import Job
from lazarus.activation.prepare import prepare
from lazarus.activation.run import Silence, given_for
from lazarus.cli import app
from lazarus.engine import KeptStates, SpillBuffer
from lazarus.errors import PositionError, PromptsError, UnsupportedModelError, UsageError
from lazarus.estimating import Size, extrapolated, spread_out
from lazarus.loading import kind_beside
from lazarus.models import Clock
from lazarus.models.skipping import skip_blocks
from lazarus.options import Options
from lazarus.ranks import Rank
from lazarus.recordings import TensorReader
from lazarus.render.base import estimates
from lazarus.trajectory.rows import KeptRows
from packed import quantised_copy

TEXTS = ["Hello, how are you?", "What is AI?", "The answer is 42.", "Calculate 2 + 2.", "Write", "Paris " * 4]
PROMPTS = [f"{text} {'x' * n}" for n in range(3) for text in TEXTS]
N_LAYERS = 7
"""more than run of a kind, so that some are skipped"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A deeper tiny Llama, and the same with its weights changed a little."""
    root, model = tmp_path_factory.mktemp("pair"), tiny_llama(num_hidden_layers=N_LAYERS)
    return (
        save_model(root / "base", model, tiny_tokenizer()),
        save_model(root / "finetuned", perturbed(model), tiny_tokenizer()),
    )


def counted(base: Path, finetuned: Path, **options: Any) -> tuple[int, Any]:
    """The operations of a run's passes as torch counts them, and the pair that ran."""
    given = given_for((base, finetuned), PROMPTS, None, Rank(), Options.make(**options))
    prepared = prepare(given, base, finetuned, Silence())
    with FlopCounterMode(display=False) as counter:
        for _ in Job(prepared.pair, prepared.run, lambda _: None).run_all():
            pass
    return counter.get_total_flops(), prepared


OPTIONS: dict[str, dict[str, Any]] = {
    "by default": {},
    "several batches": {"batch_tokens": 64},
    "every token": {"position": "all"},
    "the mean": {"position": "mean", "batch_tokens": 40},
    "localized": {"localize": True},
    "inside blocks": {"sites": "all"},
    "streamed": {"memory": "stream"},
    "by text": {"align": "text"},
    "without noise": {"no_noise_floor": True},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_operations_are_those_that_a_run_takes(options: dict[str, Any], pair: tuple[Path, Path]) -> None:
    flops, prepared = counted(*pair, **options)
    found = estimate_run(*pair, PROMPTS, **options)
    assert found.flops == flops > 0
    assert found.n_batches == len(prepared.run.batches(prepared.pair))
    assert found.n_tokens == sum(len(prompt.ids) for prompt in prepared.reading.base)


def test_a_prefix_that_all_prompts_have_is_counted_once(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=N_LAYERS, max_position_embeddings=256)
    base = save_model(tmp_path / "base", model, tiny_tokenizer())
    finetuned = save_model(tmp_path / "finetuned", perturbed(model), tiny_tokenizer())
    prompts = [f"{'You are a helpful assistant. ' * 2}{text}" for text in PROMPTS]
    given = given_for((base, finetuned), prompts, None, Rank(), Options())
    prepared = prepare(given, base, finetuned, Silence())
    assert prepared.run.n_prefix > 0
    with FlopCounterMode(display=False) as counter:
        for _ in Job(prepared.pair, prepared.run, lambda _: None).run_all():
            pass
    assert estimate_run(base, finetuned, prompts).flops == counter.get_total_flops()


def test_an_adapter_shares_its_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[5, 6])
    save_adapter(tmp_path / "adapter", pair[0], config)
    found = estimate_run(pair[0], tmp_path / "adapter", PROMPTS)
    both = estimate_run(*pair, PROMPTS)
    files = [pair[0] / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"]
    assert found.bytes_read == sum(file.stat().st_size for file in files)
    assert found.flops == counted(pair[0], tmp_path / "adapter")[0]
    assert found.flops < 0.8 * both.flops  # the blocks below the adapter's run once


def test_files_are_read_once_in_memory_and_their_weights_held(pair: tuple[Path, Path]) -> None:
    found = estimate_run(*pair, PROMPTS)
    assert found.mode == "resident"
    assert found.bytes_read == sum((folder / "model.safetensors").stat().st_size for folder in pair)
    assert found.device_bytes is None
    assert found.seconds == pytest.approx(sum(part.seconds for part in found.parts))


def test_bytes_of_a_streamed_run_are_those_of_its_pagers(pair: tuple[Path, Path]) -> None:
    _, prepared = counted(*pair, memory="stream")
    read = sum(model.pager.bytes_read for model in (prepared.pair.base, prepared.pair.finetuned))
    found = estimate_run(*pair, PROMPTS, memory="stream")
    assert found.mode == "stream"
    # What is outside of the blocks is read in portions by the one, and counted whole by the other.
    assert found.bytes_read == pytest.approx(read, rel=0.15)


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of a third of a gigabyte whose file has a header and nothing but a hole after it."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("hollow") / name
        config = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=1).config
        config.num_hidden_layers = 20
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tiny_tokenizer().save_pretrained(folder)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        header: dict[str, Any] = {}
        start = 0
        for key, tensor in model.state_dict().items():
            end = start + 4 * tensor.numel()
            header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + start)
        return folder

    return make


def test_no_weight_is_loaded(hollow: Callable[[str], Path]) -> None:
    base, finetuned = hollow("base"), hollow("finetuned")
    size = (base / "model.safetensors").stat().st_size
    process = psutil.Process()
    read, held = process.io_counters().read_chars, process.memory_info().rss
    found = estimate_run(base, finetuned, PROMPTS)
    assert found.bytes_read == 2 * size > 6 * 10**8
    assert found.peak_bytes > 2 * size
    # A sample of each file is read, to see how fast that goes; what runs is a few blocks.
    assert process.io_counters().read_chars - read < size / 3
    assert process.memory_info().rss - held < size
    streamed = estimate_run(base, finetuned, PROMPTS, memory="stream")
    assert streamed.peak_bytes < found.peak_bytes - size
    assert streamed.flops == found.flops


def test_memory_is_that_of_a_run(pair: tuple[Path, Path]) -> None:
    """Of a small pair it is the libraries' own: what this process holds, and little more."""
    found = estimate_run(*pair, PROMPTS)
    assert psutil.Process().memory_info().rss * 0.9 < found.peak_bytes


@pytest.mark.parametrize("attribute", [None, "blocks"])
def test_attribution_is_told_to_be_a_rule(attribute: str | None, pair: tuple[Path, Path]) -> None:
    found = estimate_run(*pair, PROMPTS, attribute=attribute)
    assert ("attribution" in {part.name for part in found.parts}) == (attribute is not None)
    assert any("by a rule" in remark for remark in found.remarks) == (attribute is not None)


def test_no_work_folder_is_made(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = estimate_run(*pair, PROMPTS, work_dir=str(tmp_path / "work"), memory="stream", batch_tokens=32)
    alone = estimate_run(*pair, PROMPTS, memory="stream", batch_tokens=32)
    assert not (tmp_path / "work").exists()
    assert any("work_dir" in remark for remark in found.remarks)
    assert found.bytes_read > 2 * alone.bytes_read  # each shard reads all blocks


def test_other_architectures_and_files(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    config = GPT2Config(
        n_embd=32, n_layer=5, n_head=4, vocab_size=300, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    base = save_model(tmp_path / "gpt2", model, tiny_tokenizer())
    finetuned = save_model(tmp_path / "gpt2-finetuned", perturbed(model), tiny_tokenizer())
    assert estimate_run(base, finetuned, PROMPTS).flops == counted(base, finetuned)[0]
    model_of_pair = AutoModelForCausalLM.from_pretrained(pair[0])
    kind = gguf.GGMLQuantizationType.Q8_0
    file = save_gguf(tmp_path / "model.gguf", model_of_pair, tiny_tokenizer(), kind)
    found = estimate_run(pair[0], file, PROMPTS)
    assert found.flops == counted(pair[0], file)[0]
    assert 0 < found.bytes_read - (pair[0] / "model.safetensors").stat().st_size < file.stat().st_size


def test_a_prompt_or_an_option_that_a_run_refuses_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PositionError, match="none at position 60"):
        estimate_run(*pair, PROMPTS, position=60)
    with pytest.raises(UsageError, match="unknown option"):
        estimate_run(*pair, PROMPTS, positions="all")  # type: ignore[call-arg]


def test_a_model_in_memory_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="not loaded: give them by their names"):
        estimate_run(tiny_llama(), pair[0], PROMPTS, tokenizer=tiny_tokenizer())


def test_quantised_weights_are_estimated_as_they_are_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Decoded as they are read; what transformers runs as it is cannot be built without its weights."""
    quantised = quantised_copy(pair[0], tmp_path / "quantised")
    found = estimate_run(pair[0], quantised, PROMPTS)
    assert found.flops == counted(pair[0], quantised)[0]
    assert found.bytes_read == sum((f / "model.safetensors").stat().st_size for f in (pair[0], quantised))
    with pytest.raises(UnsupportedModelError, match="cannot be estimated without its weights"):
        estimate_run(pair[0], quantised, PROMPTS, dequantize="never")


@pytest.mark.parametrize(
    "options", [{}, {"position": "last"}, {"logits": True}, {"memory": "stream"}], ids=str
)
def test_a_recording_is_estimated(options: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = estimate_record(pair[0], PROMPTS, **options)
    with FlopCounterMode(display=False) as counter:
        recorded = record(pair[0], PROMPTS, tmp_path / "recording", **options)
    assert found.finetuned is None
    # The run also learns how the model behaves, which is not of its passes.
    assert 0.5 * counter.get_total_flops() < found.flops < counter.get_total_flops()
    if "memory" not in options:
        assert found.bytes_read == (pair[0] / "model.safetensors").stat().st_size
    states = [
        recorded.rows(i, site) for i in range(len(PROMPTS)) for site in recorded.sites if site != "logits"
    ]
    if not options.get("logits"):
        assert found.bytes_written == sum(rows.nbytes for rows in states)


def test_what_llama_cpp_takes_is_not_estimated(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"what llama\.cpp takes is not known"):
        estimate_record(pair[0], PROMPTS, runtime="llama.cpp")


# --- a series -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"position": "all", "batch_tokens": 64}, {"memory": "stream"}],
    ids=["by default", "every token", "streamed"],
)
def test_a_series_is_estimated(
    options: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*PROMPTS, PROMPTS[0]]  # a repeat has rows of its own, and does not run
    members = [pair[1], pair[0], pair[1]]
    found = estimate_series(pair[0], members, prompts, **options)
    one = estimate_series(pair[0], members[:1], prompts, **options)
    assert found.members == list(map(str, members))
    assert found.finetuned is None
    assert one.n_tokens == found.n_tokens
    assert one.n_batches == found.n_batches
    read = list[int]()
    at = KeptRows.at

    def counted(self: KeptRows, site: Any) -> Any:
        read.append(self.sizes().get(str(site), 0))
        return at(self, site)

    monkeypatch.setattr(KeptRows, "at", counted)
    series(pair[0], members, prompts, work_dir=str(tmp_path / "work"), **options)
    files = [TensorReader(path).specs for path in (tmp_path / "work").glob("*.safetensors")]
    assert len(files) == 4
    assert found.bytes_written == sum(spec.n_bytes for specs in files for spec in specs.values())
    assert found.rows_read == sum(read)
    if "memory" in options:
        assert 2 * one.bytes_read < found.bytes_read < 3 * one.bytes_read  # base runs beside each
    else:
        sizes = [(folder / "model.safetensors").stat().st_size for folder in pair]
        # A member that is base is over its very files.
        assert found.bytes_read == sizes[0] + 2 * sizes[1]
        assert found.flops < 2 * one.flops + one.flops / 2  # base runs once


def test_operations_of_a_member_alone_are_those_that_it_takes(pair: tuple[Path, Path]) -> None:
    one, two = (estimate_series(pair[0], [pair[1]] * n, PROMPTS) for n in (1, 2))
    _, prepared = counted(*pair)
    kept = KeptStates(SpillBuffer(2**30))
    job = Job(prepared.pair, replace(prepared.run, noise_floor=False), lambda _: None, kept=kept)
    list(job.run_all())
    with FlopCounterMode(display=False) as counter:
        list(job.run_all())
    assert two.flops - one.flops == counter.get_total_flops() > 0


def test_members_of_a_kind_are_measured_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """And an adapter is another kind than a checkpoint: all of its blocks run, beside base's rows."""
    save_adapter(tmp_path / "adapter", pair[0], LoraConfig(r=4, target_modules=["q_proj"]))
    sizes = [pair[0] / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"]
    options, device = Options(), torch.device("cpu")
    (first, n_bytes), (second, _), (third, of_adapter) = (
        kind_beside(pair[0], member, options, device) for member in (pair[1], pair[1], tmp_path / "adapter")
    )
    assert first == second != third
    assert (n_bytes, of_adapter) == ((pair[1] / "model.safetensors").stat().st_size, sizes[1].stat().st_size)
    found = estimate_series(pair[0], [tmp_path / "adapter"] * 2, PROMPTS)
    assert found.bytes_read == sizes[0].stat().st_size + 2 * sizes[1].stat().st_size


def test_a_series_with_a_recording_is_not_estimated(pair: tuple[Path, Path], tmp_path: Path) -> None:
    record(pair[0], PROMPTS[:2], tmp_path / "recording")
    with pytest.raises(UsageError, match="one of these is a recording"):
        estimate_series(pair[0], [pair[1], tmp_path / "recording"], PROMPTS[:2])
    with pytest.raises(PromptsError, match="No prompt"):
        estimate_series(pair[0], [pair[1]], None)


# --- the command --------------------------------------------------------------------------------


def invoke(pair: tuple[Path, Path], *arguments: str | Path) -> Any:
    words = [
        "introspect",
        "activation-diff",
        "-b",
        pair[0],
        "-f",
        pair[1],
        "-p",
        "Hello,What is AI",
        "--estimate",
    ]
    return CliRunner().invoke(app, [*map(str, words), *map(str, arguments)])


def test_the_command_prints_the_estimate_and_does_nothing_else(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    done = invoke(pair, "-o", tmp_path / "diff.json", "--expect", "identical")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "diff.json").exists()
    lines = done.output.splitlines()
    assert lines[0] == f"An estimate for {pair[0]} and {pair[1]}: nothing was run."
    assert "Mode         resident: all weights in memory, in float32 on cpu, 1 thread" in lines
    assert any(re.fullmatch(r"Prompts      2 prompts, \d+ tokens, in 1 batch", line) for line in lines)
    for name in ("Read", "Memory", "Computation", "Time"):
        assert re.search(rf"^{name} +[\d.]+ (min|s|[kMG]B|[MG]FLOP)", done.output, flags=re.MULTILINE), name
    assert re.search(r"^ +start +[\d.]+ (s|min)", done.output, flags=re.MULTILINE)
    assert lines[-1] == "Note: saving results is not in it"


def test_the_command_record_is_estimated_and_makes_no_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    words = ["introspect", "record", "-m", pair[0], "-p", "Hello,What is AI", "-o", folder, "--estimate"]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"An estimate for {pair[0]}: nothing was run.")
    assert re.search(r"^Write +[\d.]+ kB of hidden states", done.output, flags=re.MULTILINE)
    assert not folder.exists()


def test_the_command_series_is_estimated(pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["introspect", "series", "-b", pair[0], "-f", pair[1], "-f", pair[0], "-p", "Hello,What is AI"]
    work = tmp_path / "work"
    done = CliRunner().invoke(app, [*map(str, words), "--work-dir", str(work), "--expect-path", "--estimate"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"An estimate for {pair[0]} and 2 members: nothing was run.")
    assert re.search(
        r"^Write +[\d.]+ kB of hidden states, read again as [\d.]+ kB", done.output, re.MULTILINE
    )
    for name in ("loading", "passes and metrics", "steps", "distances"):
        assert re.search(rf"^ +{name} +[\d.]+ (s|min)", done.output, flags=re.MULTILINE), name
    assert "Note: --work-dir is in it as a run that begins anew" in done.output
    assert not work.exists()


def test_a_wrong_output_is_refused_before_anything_is_estimated(pair: tuple[Path, Path]) -> None:
    done = invoke(pair, "-o", "no/such/folder/diff.json")
    assert done.exit_code == 2
    assert "An estimate" not in done.output


def test_the_text_has_units_and_flags() -> None:
    found = Estimate(
        command="activation-diff", base="a", finetuned="b", mode="stream", dtype="bfloat16", device="cuda:0",
        n_threads=4, n_prompts=2000, n_tokens=41000, n_batches=1, bytes_read=420_000_000_000,
        peak_bytes=999_900_000, device_bytes=7_000_000_000, flops=2_800_000_000_000_000, seconds=3725.0,
        parts=[], remarks=["option \x00 none"],
    )  # fmt: skip
    lines = estimates.text(found).splitlines()
    assert lines[2:] == [
        "Mode         stream: a block of each model at a time, in bfloat16 on cuda:0",
        "Prompts      2,000 prompts, 41,000 tokens, in 1 batch",
        "Read         420 GB of weights",
        "Memory       1e+03 MB at its peak",
        "Computation  2.8 PFLOP",
        "Time         1 h 2 min",
        "GPU memory   7 GB",
        "Note: option \x00 none",
    ]


# --- a few batches, a few blocks ------------------------------------------------------------------


@pytest.mark.parametrize("n_run", [2, 3, 5, 9])
def test_times_on_a_line_are_found_from_a_few(n_run: int) -> None:
    sizes = [Size(n) for n in (512, 400, 390, 250, 200, 130, 90, 64, 8)]
    seconds = [0.5 + 0.01 * size.n_tokens for size in sizes]
    order = spread_out(sizes)
    assert sorted(order) == list(range(9))
    assert order[:2] == [0, 8]
    found = extrapolated(sizes, {i: seconds[i] for i in order[:n_run]})
    assert found.n_run == n_run
    assert found.seconds == pytest.approx(sum(seconds))


def test_one_batch_alone_stands_for_the_others_by_its_size() -> None:
    found = extrapolated([Size(136), Size(36)], {0: 2.0})
    assert found.seconds == pytest.approx(3.0)  # 64 tokens more a batch


def test_blocks_are_skipped_and_counted() -> None:
    clock, ran = Clock(torch.device("cpu")), list[int]()
    model = tiny_llama(num_hidden_layers=N_LAYERS)
    blocks = list(model.model.layers)
    for index, block in enumerate(blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    skip_blocks(blocks, clock, n_run=3)
    with torch.no_grad():
        states = model.model(input_ids=torch.arange(6)[None], use_cache=False).last_hidden_state
        assert ran == [0, 1, 2]
        assert states.shape == (1, 6, 32)
        assert clock.skipped_seconds > 0
        # With another shape the first ones run again, and tell what it takes.
        ran.clear()
        model.model(input_ids=torch.arange(8)[None], use_cache=True)
        assert ran == [0, 1, 2]


def test_a_run_after_an_estimate_is_what_it_was(pair: tuple[Path, Path]) -> None:
    before = activation_diff(*pair, PROMPTS)
    estimate_run(*pair, PROMPTS)
    after = activation_diff(*pair, PROMPTS)
    assert [layer.divergence for layer in before.layers] == [layer.divergence for layer in after.layers]
