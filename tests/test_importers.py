"""Recordings from the files of other programs: of vLLM's layout, and arrays under names of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from factories import save_model, tiny_llama
from lazarus import LazarusError, Recording
from lazarus.errors import RecordingError, UsageError
from lazarus.recordings import from_arrays, from_vllm, record_gguf
from numpy_llama import forward, read_model

N_LAYERS, WIDTH = 4, 32
IDS = [[5, 17, 255], [3, 99, 42, 17, 5]]


def states_of(ids: list[int]) -> torch.Tensor:
    """[tokens, layers, hidden], as no two prompts, tokens or layers have them."""
    generator = torch.Generator().manual_seed(sum(ids))
    return torch.randn(len(ids), N_LAYERS + 1, WIDTH, generator=generator)


def write_requests(
    folder: Path, layers: list[int] | None = None, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """The files of two requests, the tenth and the ninth, as vLLM's connector writes them."""
    folder.mkdir()
    written = []
    for name, ids in zip(("9-bb21.safetensors", "10-a1f0.safetensors"), IDS, strict=True):
        states = states_of(ids).to(dtype)
        written.append(states)
        asked = states if layers is None else states[:, layers].contiguous()
        save_file({"hidden_states": asked, "token_ids": torch.tensor(ids)}, folder / name)
        (folder / f"{name}.lock").touch()
    return written


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_layer_of_vllm_is_where_it_belongs(tmp_path: Path, dtype: torch.dtype) -> None:
    written = write_requests(tmp_path / "states", dtype=dtype)
    made = from_vllm(
        tmp_path / "states", tmp_path / "recording", model="org/model", n_layers=N_LAYERS, device="cuda"
    )
    assert made.contents.model.run_dtype == str(dtype).removeprefix("torch.")
    assert (made.contents.runtime.name, made.contents.runtime.device) == ("vllm", "cuda")
    assert made.sites == ["embedding", *(f"resid_post.{i}" for i in range(N_LAYERS))]
    for index, (ids, states) in enumerate(zip(IDS, written, strict=True)):
        assert made.prompts[index].ids == ids
        np.testing.assert_array_equal(made.rows(index, "embedding"), states[:, 0].float().numpy())
        for layer in range(N_LAYERS):
            rows = made.rows(index, f"resid_post.{layer}")
            np.testing.assert_array_equal(rows, states[:, layer + 1].float().numpy())


def test_some_layers_of_vllm_in_the_order_of_its_files(tmp_path: Path) -> None:
    written = write_requests(tmp_path / "states", [1, 4])
    files = [tmp_path / "states" / name for name in ("10-a1f0.safetensors", "9-bb21.safetensors")]
    made = from_vllm(files, tmp_path / "recording", model="m", n_layers=N_LAYERS, layers=[1, 4])
    assert made.sites == ["resid_post.0", "resid_post.3"]
    assert [prompt.ids for prompt in made.prompts] == IDS[::-1]
    np.testing.assert_array_equal(made.rows(0, "resid_post.3"), written[1][:, 4].float().numpy())


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: vars(tensors.pop(name)).clear()


def unwritten(tensors: dict[str, torch.Tensor]) -> None:
    tensors["hidden_states"][1, 2] = 0


def shorter(tensors: dict[str, torch.Tensor]) -> None:
    tensors["token_ids"] = tensors["token_ids"][:-1]


def as_floats(tensors: dict[str, torch.Tensor]) -> None:
    tensors["token_ids"] = tensors["token_ids"].float()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without("token_ids"), "it holds hidden_states, and vLLM writes token_ids and hidden_states"),
        (unwritten, "resid_post.1 of token 1 is all zeros, so vLLM did not write it"),
        (shorter, "has the shape [3, 5, 32], and [2, 5, hidden] is expected"),
        (as_floats, "its ids are of type float32"),
    ],
)
def test_a_bad_file_of_vllm_is_refused(tmp_path: Path, damage: Callable[[Any], None], told: str) -> None:
    (tmp_path / "states").mkdir()
    tensors = {"hidden_states": states_of(IDS[0]), "token_ids": torch.tensor(IDS[0])}
    damage(tensors)
    save_file(tensors, tmp_path / "states" / "0.safetensors")
    with pytest.raises(RecordingError) as refused:
        from_vllm(tmp_path / "states", tmp_path / "recording", model="m", n_layers=N_LAYERS)
    assert told in str(refused.value)
    assert "0.safetensors" in str(refused.value)


@pytest.mark.parametrize("layers", [[4, 1], [1, 1], [0, 5], [-1, 2], []])
def test_layers_that_vllm_does_not_have_are_refused(tmp_path: Path, layers: list[int]) -> None:
    write_requests(tmp_path / "states")
    with pytest.raises(UsageError, match="of 4 blocks there are the layers 0 to 4"):
        from_vllm(tmp_path / "states", tmp_path / "recording", model="m", n_layers=4, layers=layers)


def as_npz(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path.with_suffix(".npz"), **arrays)


def as_npy(path: Path, arrays: dict[str, Any]) -> None:
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)


def as_safetensors(path: Path, arrays: dict[str, Any]) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    save_file(tensors, path.with_suffix(".safetensors"))


SITES = {"embedding": "emb", "resid_post.{layer}": "h{layer}.out", "final_norm": "normed"}


@pytest.mark.parametrize("write", [as_npz, as_npy, as_safetensors])
def test_arrays_under_other_names_become_a_recording(
    tmp_path: Path, write: Callable[[Path, dict[str, Any]], None]
) -> None:
    config, weights = read_model(save_model(tmp_path / "model", tiny_llama()))
    (tmp_path / "arrays").mkdir()
    ran = [forward(weights, config, ids) for ids in IDS]
    for name, ids, found in zip(("2", "10"), IDS, ran, strict=True):
        arrays = {f"h{layer}.out": found[f"resid_post.{layer}"][None] for layer in range(N_LAYERS)}
        arrays |= {"emb": found["embedding"], "normed": found["final_norm"], "tokens": np.array([ids])}
        write(tmp_path / "arrays" / name, arrays)
    made = from_arrays(
        tmp_path / "arrays", tmp_path / "recording", sites=SITES, ids="tokens", model="tiny", runtime="numpy"
    )
    assert made.contents.model.n_layers == N_LAYERS
    assert made.contents.model.hidden_size == WIDTH
    assert made.contents.model.run_dtype == "float32"
    assert set(made.sites) == set(ran[0])
    for index, (ids, found) in enumerate(zip(IDS, ran, strict=True)):
        assert made.prompts[index].ids == ids
        for site, rows in found.items():
            np.testing.assert_array_equal(made.rows(index, site), rows)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"tokens": np.arange(3)}, "none of the arrays in `sites` is there. It holds tokens"),
        ({"h0.out": np.ones((3, 8))}, "it has no array 'tokens', but h0.out"),
        (
            {"emb": np.ones((3, 8)), "normed": np.ones((3, 8)), "tokens": np.ones(3)},
            "its ids are of type float64",
        ),
        (
            {"emb": np.ones((3, 8)), "normed": np.ones((2, 8)), "tokens": np.arange(3)},
            "an array of shape [2, 8], and [3, 8] is needed",
        ),
        ({"emb": np.ones((3, 8)), "normed": np.ones((3, 8)), "tokens": np.ones((3, 2), int)}, "one row"),
    ],
)
def test_arrays_that_are_no_recording_are_refused(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    as_npz(tmp_path / "0", arrays)
    sites = {site: name for site, name in SITES.items() if "layer" not in site or "emb" not in arrays}
    only = {"resid_post.{layer}": "h{layer}.out"} if arrays.keys() == {"tokens"} else sites
    with pytest.raises(LazarusError) as refused:
        from_arrays(tmp_path, tmp_path / "recording", sites=only, ids="tokens", model="m")
    assert told in str(refused.value)


def test_nothing_to_import_is_refused(tmp_path: Path) -> None:
    for make in (from_vllm, from_arrays):
        more: dict[str, Any] = {"n_layers": 4} if make is from_vllm else {"sites": SITES}
        with pytest.raises(UsageError, match="no such folder"):
            make(tmp_path / "absent", tmp_path / "recording", model="m", **more)
        with pytest.raises(UsageError, match="no prompt is there"):
            make(tmp_path, tmp_path / "recording", model="m", **more)
    assert not (tmp_path / "recording").exists()


def test_without_llama_cpp_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(UsageError, match=r"lazarus-introspect\[llama-cpp\]"):
        record_gguf(tmp_path / "model.gguf", ["Hello"], tmp_path / "recording")
    with pytest.raises(RecordingError):
        Recording.open(tmp_path / "recording")
