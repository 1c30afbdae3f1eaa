"""Code in every part of a checkpoint, an adapter, a result: none of it runs unless it is allowed by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lazarus
from factories import perturbed, save_model, tiny_llama, tiny_tokenizer
from lazarus.errors import LazarusError

NAME = "planted_module"
PARTS: dict[str, Callable[[Path, str], None]] = {}
"""what puts code into a part of a folder; it is given the folder, and a line of Python that writes a file"""


def part(plant: Callable[[Path, str], None]) -> Callable[[Path, str], None]:
    PARTS[plant.__name__] = plant
    return plant


class Payload:
    """An object whose pickle runs a line of Python when it is read."""

    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.line,)


def changed(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(found | values), encoding="utf-8")


def with_module(folder: Path, line: str) -> None:
    for name in (f"{NAME}.py", "modeling.py", "configuration.py", "tokenization.py", "generate.py"):
        (folder / name).write_text(f"{line}\nclass Planted: pass\n")


@part
def auto_map_of_the_model(folder: Path, line: str) -> None:
    with_module(folder, line)
    own = {"AutoConfig": f"{NAME}.Planted", "AutoModelForCausalLM": f"{NAME}.Planted"}
    changed(folder / "config.json", auto_map=own, model_type="planted")


@part
def auto_map_beside_a_known_class(folder: Path, line: str) -> None:
    with_module(folder, line)
    changed(folder / "config.json", auto_map={"AutoModelForCausalLM": f"{NAME}.Planted"})


@part
def auto_map_of_the_tokenizer(folder: Path, line: str) -> None:
    with_module(folder, line)
    own = {"AutoTokenizer": [f"{NAME}.Planted", None]}
    changed(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="Planted")


@part
def custom_generate(folder: Path, line: str) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(line)
    changed(folder / "generation_config.json", custom_generate=".")


@part
def architectures(folder: Path, line: str) -> None:
    with_module(folder, line)
    changed(folder / "config.json", architectures=[f"{NAME}.Planted"])


@part
def modules_of_sentence_transformers(folder: Path, line: str) -> None:
    with_module(folder, line)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Planted", "type": f"{NAME}.Planted"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Planted").mkdir()
    changed(folder / "1_Planted" / "config.json", activation_function=f"{NAME}.Planted")


@part
def quantisation(folder: Path, line: str) -> None:
    with_module(folder, line)
    changed(folder / "config.json", quantization_config={"quant_method": NAME, "modules": f"{NAME}.Planted"})


@part
def a_kernel_of_the_hub(folder: Path, line: str) -> None:
    with_module(folder, line)
    changed(folder / "config.json", _attn_implementation=f"{NAME}/planted", attn_implementation=f"{NAME}/x")


@part
def pickled_weights(folder: Path, line: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(line)}, folder / "pytorch_model.bin")


@part
def pickled_weights_beside_safetensors(folder: Path, line: str) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        torch.save({"x": Payload(line)}, folder / name)


@part
def a_pickle_under_the_name_of_safetensors(folder: Path, line: str) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(line)))


@part
def an_index_that_names_a_pickle(folder: Path, line: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(line)}, folder / "w.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "w.bin"}}))


@part
def a_vocabulary_that_is_a_pickle(folder: Path, line: str) -> None:
    (folder / "tokenizer.json").unlink()
    for name in ("vocab.pkl", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt"):
        (folder / name).write_bytes(pickle.dumps(Payload(line)))
    changed(folder / "tokenizer_config.json", tokenizer_class="TransfoXLTokenizer")


@part
def a_chat_template(folder: Path, line: str) -> None:
    ways = [
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__.__builtins__.exec(CODE) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% import CODE as x %}",
        "{% include '/etc/passwd' %}",
        "{{ (lipsum|attr('__globals__'))['os'].popen(CODE).read() }}",
    ]
    template = "".join(f"{{% if messages|length > {n} %}}{way}{{% endif %}}" for n, way in enumerate(ways))
    (folder / "chat_template.jinja").write_text(template.replace("CODE", json.dumps(line)))


@part
def an_adapter(folder: Path, line: str) -> None:
    with_module(folder, line)
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    changed(
        folder / "adapter_config.json",
        peft_type="LORA",
        base_model_name_or_path=str(folder.parent / "base"),
        auto_mapping={"base_model_class": "Planted", "parent_library": NAME},
        megatron_config={"x": 1},
        megatron_core=NAME,
        target_modules=["q_proj"],
        corda_config={"covariance_file": str(folder / "x.pt")},
    )
    torch.save(Payload(line), folder / "x.pt")
    torch.save({"x": Payload(line)}, folder / "adapter_model.bin")


@part
def a_recording(folder: Path, line: str) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "recording.json").write_bytes(pickle.dumps(Payload(line)))
    np.save(folder / "00000.npy", np.array([Payload(line)], dtype=object), allow_pickle=True)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path, str]]:
    """Folders of a base and of a copy, and a line of Python that leaves a file; none is left afterwards."""
    base = save_model(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    other = save_model(tmp_path / "other", perturbed(tiny_llama()), tiny_tokenizer())
    mark = tmp_path / "it ran"
    line = f"open({str(mark)!r}, 'w').close()"
    monkeypatch.chdir(other)  # where `python -m lazarus` would import from
    monkeypatch.syspath_prepend(str(other))
    yield base, other, line
    assert not mark.exists()


def test_the_payload_runs_where_it_is_let(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Payload(f"open({str(mark)!r}, 'w').close()")))
    assert mark.exists()  # else none of these tests could fail


@pytest.mark.parametrize("name", sorted(PARTS))
def test_no_code_of_a_checkpoint_runs(name: str, planted: tuple[Path, Path, str]) -> None:
    base, other, line = planted
    PARTS[name](other, line)
    chat = {"messages": [{"role": "user", "content": str(i)} for i in range(8)]}
    runs: list[Callable[[], Any]] = [
        lambda: lazarus.activation_diff(base, other, ["Hello"]),
        lambda: lazarus.activation_diff(other, base, ["Hello"], memory="stream"),
        lambda: lazarus.activation_diff(base, other, [chat], chat_template="finetuned"),
        lambda: lazarus.compare(base, other, "Hello"),
        lambda: lazarus.weight_diff(base, other),
        lambda: lazarus.weight_diff(base, other, allow_pickle=True),
        lambda: lazarus.record(other, ["Hello"], other.parent / "recording"),
        lambda: lazarus.activation_diff(f"{base}+{other}", base, ["Hello"]),
    ]
    for run in runs:
        with suppress(LazarusError):  # a refusal and a result are both right; running the code is not
            run()
        shutil.rmtree(other.parent / "recording", ignore_errors=True)


def test_no_code_of_a_work_dir_runs(planted: tuple[Path, Path, str]) -> None:
    base, other, line = planted
    work = other.parent / "work"
    truth = lazarus.activation_diff(base, other, ["Hello", "What"], work_dir=str(work))
    for shard in work.glob("*.npz"):
        np.savez(shard, x=np.array([Payload(line)], dtype=object), allow_pickle=True)
    again = lazarus.activation_diff(base, other, ["Hello", "What"], work_dir=str(work))
    assert again.record.layers == truth.record.layers


def test_no_code_of_a_result_or_of_prompts_runs(planted: tuple[Path, Path, str]) -> None:
    base, other, line = planted
    content = pickle.dumps(Payload(line))
    for name in ("r.json", "r.parquet", "p.jsonl", "p.csv", "p.parquet", "p.txt"):
        path = other.parent / name
        path.write_bytes(content)
        with pytest.raises(LazarusError):
            lazarus.load_result(path) if name[0] == "r" else lazarus.activation_diff(base, other, path)
