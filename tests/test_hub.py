"""Models of the Hub, over HTTP: the libraries' own code against a server on this machine."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import LlamaForCausalLM
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from factories import tiny_llama, tiny_tokenizer
from hub_ground import FOLDERS, OUTPUT, PAIR, Ground, Outcome, numbers
from hub_server import OTHER_TOKEN, TOKEN, Fault, Repository, commit_of, files_of
from layouts import save_adapter, save_gguf, save_sentence_transformer
from lazarus.demo import BASE, FINETUNED
from lazarus.models.hub import Repository as HubRepository

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands run in forks of one process")

PROMPT = ("-p", "3 + 4 =")
COMPARED = {
    "activation-diff": ("activation-diff", "-b", "org/base", "-f", "org/arithmetic", *PROMPT),
    "weight-diff": ("weight-diff", "-b", "org/base", "-f", "org/arithmetic"),
    "compare": ("compare", "-m1", "org/base", "-m2", "org/arithmetic", *PROMPT),
    "series": ("series", "-b", "org/base", "-f", "org/base", "-f", "org/arithmetic", *PROMPT),
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with Ground(tmp_path_factory.mktemp("hub")) as found:
        yield found


@pytest.fixture(autouse=True)
def _well(ground: Ground) -> None:
    ground.well()
    ground.empty()


def done(outcome: Outcome) -> Outcome:
    """Return how a command ended that must have succeeded without a word."""
    assert (outcome.code, outcome.err) == (0, "")
    return outcome


def in_folders(ground: Ground, argv: tuple[str, ...], folders: dict[str, str] = FOLDERS) -> Any:
    """Return the numbers of a command whose models are folders and not repositories."""
    found = done(ground.run("introspect", *(folders.get(each, each) for each in argv), *OUTPUT))
    return numbers(found.result, folders)


@pytest.mark.parametrize("command", COMPARED)
def test_the_numbers_are_those_of_the_folders(command: str, ground: Ground) -> None:
    argv = COMPARED[command]
    found = done(ground.run("introspect", *argv, *OUTPUT))
    of_folders = done(ground.run("introspect", *(FOLDERS.get(each, each) for each in argv), *OUTPUT))
    assert numbers(found.result) == numbers(of_folders.result)
    if "base" in found.result:
        assert found.result["base"].get("files") == of_folders.result["base"].get("files")
    assert ground.faults_of_the_cache() == []


def test_a_recording_holds_what_that_of_the_folder_does(ground: Ground) -> None:
    record = ("introspect", "record", *PROMPT, "-o", "x", "-q", "-m")
    found = [
        {path.name: path.read_bytes() for path in Path(done(ground.run(*record, name)).folder, "x").iterdir()}
        for name in ("org/base", str(BASE))
    ]
    for each in found:
        del each["recording.json"]  # the name of the model, and the time
    assert found[0] == found[1] != {}


def test_each_thing_is_asked_for_once_and_then_the_commits_alone(ground: Ground) -> None:
    first = done(ground.run(*PAIR, *OUTPUT))
    # The two share a tokenizer, which is two files of two repositories in the cache.
    own = [line for line in first.asked if "/cdn/" not in line]
    assert Counter(own).most_common(1)[0][1] == 1
    second = done(ground.run(*PAIR, *OUTPUT))
    assert second.asked == ["GET /api/models/org/base", "GET /api/models/org/arithmetic"]


def test_a_file_that_is_not_there_is_not_asked_for(ground: Ground) -> None:
    there = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    asked = [line for line in done(ground.run(*PAIR, *OUTPUT)).asked if "/resolve/" in line]
    assert {line.rpartition("/")[2] for line in asked} == there | {"model.safetensors"}


def test_every_file_that_a_tokenizer_of_transformers_reads_is_fetched() -> None:
    found = set[str]()
    for names in TOKENIZER_MAPPING_NAMES.values():
        for name in names if isinstance(names, tuple) else (names,):
            tokenizer = getattr(transformers, name, None) if name else None
            found |= set(getattr(tokenizer, "vocab_files_names", {}).values())
    assert {"bpe.codes", "vocab.txt", "merges.txt", "source.spm"} < found
    # A folder of settings is asked for file by file, and what is data there is not a setting.
    more = {"additional_chat_templates/tool.jinja"}
    data = {"train.txt", "results.json", "trainer_state.json", "model.safetensors.index.json", "x/vocab.txt"}
    listed = frozenset(found | more | data)
    asked = set[str]()

    class Listed(HubRepository):
        def file(self, name: str) -> str | None:
            asked.add(name)
            return None

    Listed("org/base", "0" * 40, listed).fetch_settings("")
    assert asked == found | more


def test_a_revision_is_a_branch_a_tag_or_a_commit_and_all_files_are_of_it(ground: Ground) -> None:
    tuned = files_of(FINETUNED)
    commit = ground.hub.repositories["org/base"].add(tuned, "v1", "refs/pr/1")
    at_main = numbers(done(ground.run(*PAIR, *OUTPUT)).result)
    for revision in ("v1", "refs/pr/1", commit):
        argv = [f"{each}@{revision}" if each == "org/base" else each for each in PAIR]
        found = done(ground.run(*argv, *OUTPUT))
        assert found.result["base"]["revision"] == commit == commit_of(tuned)
        assert numbers(found.result) != at_main
        of_base = [line for line in found.asked if line.startswith("HEAD /org/base/")]
        assert all(f"/resolve/{commit}/" in line for line in of_base)


@pytest.mark.parametrize("revision", ["../../../../evil", "/evil", "x/..", "x..y"])
def test_a_revision_leads_nowhere_out_of_the_cache(revision: str, ground: Ground) -> None:
    repository = ground.hub.repositories["org/base"]
    repository.refs[revision] = repository.refs["main"]
    for name in (f"org/base@{revision}", f"org/base@{revision}:x.gguf"):
        found = ground.run(*(name if each == "org/base" else each for each in PAIR), *OUTPUT)
        assert found.code == 1
        assert "not a Hub id" in found.err
        assert found.asked == []


def test_a_revision_may_be_longer_than_a_name_of_a_file(ground: Ground) -> None:
    argv = [f"{each}@{'x' * 300}" if each == "org/base" else each for each in PAIR]
    assert "HF_HUB_OFFLINE keeps it" in ground.run(*argv, *OUTPUT, env={"HF_HUB_OFFLINE": "1"}).err


ANSWERS: dict[str, Any] = {
    "a commit that leads out": {"sha": "../../../../evil", "siblings": []},
    "a commit that is a folder": {"sha": "/", "siblings": []},
    "no name": {"sha": "", "siblings": []},
    "no commit": {"siblings": []},
    "a file without a name": {"sha": "0" * 40, "siblings": [{}]},
    "a number": {"sha": "0" * 40, "siblings": [{"rfilename": 3}]},
    "no answer": [],
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_no_hub_answers_is_told_and_nothing_is_written(answer: str, ground: Ground) -> None:
    told = ANSWERS[answer] | {"id": "org/base"} if isinstance(ANSWERS[answer], dict) else ANSWERS[answer]
    fault = Fault("GET /api/models/org/base", 200, body=json.dumps(told).encode())
    found = ground.run(*PAIR, *OUTPUT, faults=[fault])
    assert (found.code, found.asked) == (1, ["GET /api/models/org/base"])
    assert "is not a Hub" in found.err
    assert not ground.home.exists()


@pytest.mark.parametrize(
    "name", ["../evil.json", "/evil.json", "..\\evil.json", "./config.json", "a\0b.json"]
)
def test_a_list_of_files_leads_nowhere_out_of_the_cache(name: str, ground: Ground) -> None:
    repository = ground.hub.repositories["org/base"]
    commit = repository.refs["main"]
    repository.commits[commit][name] = b"{}"
    ground.run(*PAIR, *OUTPUT)
    assert ground.faults_of_the_cache() == []
    assert not list(ground.root.rglob("*evil.json"))


@pytest.mark.parametrize("where", ["HF_TOKEN", "file"])
@pytest.mark.parametrize("how", ["is_private", "is_gated"])
def test_a_token_opens_a_repository_and_goes_to_the_hub_alone(where: str, how: str, ground: Ground) -> None:
    setattr(ground.hub.repositories["org/base"], how, True)
    env = {"HF_TOKEN": TOKEN} if where == "HF_TOKEN" else {}
    if where == "file":
        ground.home.mkdir()
        (ground.home / "token").write_text(TOKEN)
    found = done(ground.run(*PAIR, *OUTPUT, env=env))
    asked = [seen for seen in found.seen if seen.line in found.asked]
    hosts = ("127.0.0.1", "localhost")
    tokens = {host: {seen.token for seen in asked if seen.host == host} for host in hosts}
    assert tokens == {"127.0.0.1": {TOKEN}, "localhost": {None}}


def test_shards_are_fetched_by_their_index(ground: Ground, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(BASE).save_pretrained(tmp_path, max_shard_size="500KB")
    shards = files_of(tmp_path)
    assert len(shards) > 4
    own = {name: content for name, content in files_of(BASE).items() if name != "model.safetensors"}
    ground.hub.repositories["org/base"] = Repository.of(own | shards)
    found = done(ground.run(*PAIR, *OUTPUT))
    assert numbers(found.result)["results"] == in_folders(ground, COMPARED["activation-diff"])["results"]


def test_adapters_come_from_the_hub(ground: Ground, tmp_path: Path) -> None:
    save_adapter(tmp_path, BASE, LoraConfig(r=2, target_modules=["q_proj"]))
    ground.hub.repositories["org/adapter"] = Repository.of(files_of(tmp_path))
    argv = ("activation-diff", "-b", "org/base", "-f", "org/adapter", *PROMPT)
    expected = in_folders(ground, argv, {"org/base": str(BASE), "org/adapter": str(tmp_path)})
    for finetuned in ("org/adapter", "org/base+org/adapter"):
        named = (finetuned if each == "org/adapter" else each for each in argv)
        found = done(ground.run("introspect", *named, *OUTPUT))
        assert numbers(found.result)["results"] == expected["results"]
    assert ground.faults_of_the_cache() == []


def test_an_adapter_alone_is_read_on_the_base_that_it_names(ground: Ground, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", BASE, LoraConfig(r=2, target_modules=["q_proj"]))
    files = files_of(tmp_path / "adapter")
    files["adapter_config.json"] = files["adapter_config.json"].replace(str(BASE).encode(), b"org/base")
    ground.hub.repositories["org/adapter"] = Repository.of(files)
    found = ground.run(
        "introspect", "activation-diff", "-b", "org/adapter", "-f", "org/base", *PROMPT, *OUTPUT
    )
    assert done(found).result["base"]["id"] == "org/adapter"


def test_a_gguf_file_is_that_of_a_repository(ground: Ground, tmp_path: Path) -> None:
    save_gguf(tmp_path / "model.gguf", tiny_llama(), tiny_tokenizer(), gguf.GGMLQuantizationType.F32)
    ground.hub.repositories["org/model"] = Repository.of(files_of(tmp_path))
    names = {"org/model": str(tmp_path / "model.gguf"), "org/model:model.gguf": str(tmp_path / "model.gguf")}
    argv = ("activation-diff", "-b", "org/model", "-f", "org/model:model.gguf", "-p", "ab")
    found = done(ground.run("introspect", *argv, *OUTPUT))
    assert numbers(found.result) == in_folders(ground, argv, names)


def test_a_sentence_transformer_is_read_from_a_folder_of_its_repository(
    ground: Ground, tmp_path: Path
) -> None:
    save_sentence_transformer(tmp_path, "0_Transformer", tiny_llama(), tiny_tokenizer())
    ground.hub.repositories["org/model"] = Repository.of(files_of(tmp_path))
    argv = ("activation-diff", "-b", "org/model", "-f", "org/model", "-p", "ab")
    found = done(ground.run("introspect", *argv, *OUTPUT))
    assert numbers(found.result) == in_folders(ground, argv, {"org/model": str(tmp_path)})


def test_pickled_weights_are_fetched_only_where_they_are_allowed(ground: Ground, tmp_path: Path) -> None:
    torch.save(LlamaForCausalLM.from_pretrained(BASE).state_dict(), tmp_path / "pytorch_model.bin")
    files = {**files_of(BASE), **files_of(tmp_path)}
    del files["model.safetensors"]
    ground.hub.repositories["org/base"] = Repository.of(files)
    argv = ("introspect", *COMPARED["weight-diff"], *OUTPUT)
    refused = ground.run(*argv)
    assert refused.code == 1
    assert "--allow-pickle" in refused.err
    assert not any("pytorch_model.bin" in line for line in refused.asked)
    assert done(ground.run(*argv, "--allow-pickle")).result is not None


def test_a_model_with_leave_to_run_its_code_is_fetched_too(ground: Ground) -> None:
    found = done(ground.run(*PAIR, *OUTPUT, "--trust-remote-code"))
    assert numbers(found.result)["results"] == in_folders(ground, COMPARED["activation-diff"])["results"]


def test_commands_at_once_fetch_into_one_cache(ground: Ground) -> None:
    expected = in_folders(ground, COMPARED["activation-diff"])
    for found in ground.run_at_once(3, *PAIR, *OUTPUT):
        assert numbers(done(found).result) == expected
    assert ground.faults_of_the_cache() == []


def test_a_mirror_may_be_in_a_folder_of_its_host(ground: Ground) -> None:
    ground.hub.prefix = "/mirrors/hub"
    try:
        found = done(ground.run(*PAIR, *OUTPUT, env={"HF_ENDPOINT": ground.hub.endpoint}))
    finally:
        ground.hub.prefix = ""
    assert all(line.split()[1].startswith(("/mirrors/hub/", "/cdn/")) for line in found.asked)


def test_a_proxy_of_the_environment_is_used(ground: Ground) -> None:
    proxy = {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": ground.hub.endpoint, "NO_PROXY": None}
    found = done(ground.run(*PAIR, *OUTPUT, env=proxy))
    assert {seen.host for seen in found.seen} == {"hub.invalid", "localhost"}


def test_xet_can_be_left_out(ground: Ground) -> None:
    ground.hub.has_xet = True
    try:
        found = done(ground.run(*PAIR, *OUTPUT, env={"HF_HUB_DISABLE_XET": "1"}))
    finally:
        ground.hub.has_xet = False
    assert not any("xet" in line for line in found.asked)


def test_a_token_of_another_account_sees_what_is_public(ground: Ground) -> None:
    found = done(ground.run(*PAIR, *OUTPUT, env={"HF_TOKEN": OTHER_TOKEN}))
    assert numbers(found.result)["results"] == in_folders(ground, COMPARED["activation-diff"])["results"]
