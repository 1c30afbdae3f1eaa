"""weight_diff of two vocabularies: a token's row is compared with its own row, wherever it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from factories import notes_of, save_model, tiny_llama
from layouts import WEIGHTS, edit_weights, save_adapter
from lazarus import WeightDiff, weight_diff
from lazarus.errors import GateNotMetError, NoDataError
from lazarus.results import TensorRecord
from lazarus.weights.views import MemoryView, PickedRows

N = 40
NAMES = {"embed": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
WORDS = [f"w{i}" for i in range(N)]


def words(names: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of these words, with their places as ids."""
    vocabulary = {name: place for place, name in enumerate(names)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=names[0])))


def saved(folder: Path, names: Sequence[str] | None, n_rows: int = N) -> Path:
    """A model with that many rows, and a tokenizer of these words."""
    model = tiny_llama(vocab_size=n_rows, tie_word_embeddings=False)
    save_model(folder, model)
    if names is not None:
        words(names).save_pretrained(folder)
    return folder


def with_tables(
    base: Path, folder: Path, names: Sequence[str] | None, change: Callable[[Tensor], Tensor]
) -> Path:
    """A copy of a model with other tables and another tokenizer."""
    edit_weights(
        base, folder, lambda t: t.update({key: change(t[key]).contiguous() for key in NAMES.values()})
    )
    n_rows = len(load_file(folder / WEIGHTS)[NAMES["embed"]])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": n_rows}))
    if names is not None:
        words(names).save_pretrained(folder)
    return folder


def rows_of(diff: WeightDiff) -> dict[str, TensorRecord]:
    return {row.component: row for row in diff.results if row.component in NAMES}


def order(seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).permutation(N)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base", WORDS)


def test_a_token_that_moved_is_compared_with_its_own_row(base: Path, tmp_path: Path) -> None:
    places = order()
    moved = with_tables(base, tmp_path / "moved", [WORDS[i] for i in places], lambda t: t[places])
    diff = weight_diff(base, moved)
    assert all(row.n_changed == 0 and row.shape[0] == N for row in rows_of(diff).values())
    assert (diff.summary.verdict, diff.summary.n_unmatched) == ("changed", 0)
    assert diff.summary.n_moved_tokens == sum(place != i for i, place in enumerate(places))
    assert f"but {diff.summary.n_moved_tokens} tokens have another id" in str(diff)
    with pytest.raises(GateNotMetError, match="another id"):
        diff.check_gates(expect="identical")
    diff.check_gates(fail_above=0)


def test_tokens_that_only_the_longest_table_holds_have_moved_too(base: Path, tmp_path: Path) -> None:
    names = [*WORDS[1:-2], WORDS[0], WORDS[-1], WORDS[-2]]
    places = [WORDS.index(name) for name in names]
    short = edit_weights(base, tmp_path / "short", lambda t: t.update({"lm_head.bias": torch.ones(N - 2)}))
    diff = weight_diff(short, with_tables(short, tmp_path / "moved", names, lambda t: t[places]))
    assert diff.summary.n_moved_tokens == N
    assert set(diff.notes) == {
        f"{table} was compared by token in {n} rows, of which {n} are at another id in fine-tuned"
        for table, n in (("embed", N), ("lm_head", N), ("lm_head.bias", N - 2))
    }


def test_what_changed_in_a_table_whose_tokens_moved(base: Path, tmp_path: Path) -> None:
    places = order()

    def change(table: Tensor) -> Tensor:
        table = table[places]
        table[7] += 1
        return table

    rows = rows_of(
        weight_diff(base, with_tables(base, tmp_path / "moved", [WORDS[i] for i in places], change))
    )
    for row in rows.values():
        assert row.n_changed == row.shape[1]
        assert row.change_norm == pytest.approx(np.sqrt(row.shape[1]), rel=1e-6)


def test_ids_that_mean_other_tokens_are_other_rows(base: Path, tmp_path: Path) -> None:
    """The same bits, and every token has another row."""
    places = order()
    other = with_tables(base, tmp_path / "other", [WORDS[i] for i in places], lambda t: t)
    diff = weight_diff(base, other)
    table = load_file(base / WEIGHTS)[NAMES["embed"]].double()
    expected = float((table[np.argsort(places)] - table).norm() / table.norm())
    assert rows_of(diff)["embed"].relative_change == pytest.approx(expected, rel=1e-9)
    assert diff.summary.verdict == "changed"


@pytest.mark.parametrize("at_the_end", [True, False])
def test_rows_of_new_tokens_are_listed(at_the_end: bool, base: Path, tmp_path: Path) -> None:
    new = ["<|im_start|>", "<|im_end|>"]
    names = [*WORDS, *new] if at_the_end else [*new, *WORDS]

    def grown(table: Tensor) -> Tensor:
        more = torch.ones(2, table.shape[1])
        return torch.cat([table, more] if at_the_end else [more, table])

    longer = with_tables(base, tmp_path / "grown", names, grown)
    diff = weight_diff(base, longer)
    assert all(row.n_changed == 0 and row.shape[0] == N for row in rows_of(diff).values())
    assert [found.rows_alone for found in diff.record.unmatched] == [(0, 2), (0, 2)]
    assert diff.summary.verdict == "changed"
    assert diff.summary.n_moved_tokens == (0 if at_the_end else N)
    back = weight_diff(longer, base)
    assert [found.rows_alone for found in back.record.unmatched] == [(2, 0), (2, 0)]
    told = "{} was compared by token in 40 rows" + (
        "" if at_the_end else ", of which 40 are at another id in fine-tuned"
    )
    for result, counts in ((diff, (0, 2)), (back, (2, 0))):
        alone = f"{counts[0]} rows are only in base and {counts[1]} only in fine-tuned"
        assert notes_of(result, "vocabularies-differ") == [
            f"{told.format(table)}; {alone}: '<|im_start|>', '<|im_end|>'" for table in NAMES
        ]


def test_a_token_in_place_of_another_has_no_counterpart(base: Path, tmp_path: Path) -> None:
    names = ["<|im_start|>" if name == "w7" else name for name in WORDS]
    diff = weight_diff(base, with_tables(base, tmp_path / "renamed", names, lambda t: t))
    assert [found.rows_alone for found in diff.record.unmatched] == [(1, 1), (1, 1)]
    assert "1 row only in base, 1 only in fine-tuned" in str(diff)
    assert diff.summary.verdict == "changed"
    with pytest.raises(GateNotMetError):
        diff.check_gates(fail_above=10)


def test_tables_without_a_token_in_common_are_not_compared(base: Path, tmp_path: Path) -> None:
    diff = weight_diff(base, with_tables(base, tmp_path / "other", [f"x{i}" for i in range(N)], lambda t: t))
    assert rows_of(diff) == {}
    assert [found.rows_alone for found in diff.record.unmatched] == [(N, N), (N, N)]
    (note,) = (n for n in diff.notes if n.startswith("embed "))
    assert note.startswith(
        "embed was not compared: no token is in both vocabularies; 40 rows are only in base"
    )
    assert diff.summary.verdict == "changed"


def test_tables_of_another_width_have_no_rows_in_common(base: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", tiny_llama(vocab_size=N + 2, hidden_size=16))
    words([*WORDS[::-1], "x", "y"]).save_pretrained(other)
    with pytest.raises(NoDataError, match="no tensor in common, by component and shape"):
        weight_diff(base, other)


def test_only_what_has_a_row_for_each_token_is_matched_by_token(base: Path, tmp_path: Path) -> None:
    """A bias of the head has; parts of a quantised head, empty tables and what is in a layer have not."""
    places = order()
    bias = torch.arange(float(N))
    shapes = {
        "lm_head.scales": ((), (1,)),
        "lm_head.absmax": ((0, 4), (3, 4)),
        "model.layers.0.lm_head.weight": ((N, 4), (N + 1, 4)),
    }

    def add(side: int, bias: Tensor) -> Callable[[dict[str, Tensor]], None]:
        more = {key: torch.ones(each[side]) for key, each in shapes.items()}
        return lambda tensors: tensors.update({"lm_head.bias": bias, **more})

    moved = with_tables(base, tmp_path / "moved", [WORDS[i] for i in places], lambda t: t[places])
    one, other = (
        (edit_weights(base, tmp_path / "one", add(0, bias))),
        (edit_weights(moved, tmp_path / "other", add(1, bias[places]))),
    )
    diff = weight_diff(one, other)
    (row,) = [row for row in diff.results if row.component == "lm_head.bias"]
    assert (row.shape, row.n_changed) == ([N], 0)
    found = {each.name: (each.base_shape, each.finetuned_shape) for each in diff.record.unmatched}
    assert found == {key: (list(ours), list(theirs)) for key, (ours, theirs) in shapes.items()}
    assert {each.rows_alone for each in diff.record.unmatched} == {None}


def test_rows_without_a_token_are_compared_by_number(tmp_path: Path) -> None:
    """They pad a table, and a new token takes one of them."""
    base = saved(tmp_path / "base", WORDS, N + 8)

    def change(table: Tensor) -> Tensor:
        table[N : N + 2] += 1
        return table

    tuned = with_tables(base, tmp_path / "tuned", [*WORDS, "<|im_start|>", "<|im_end|>"], change)
    diff = weight_diff(base, tuned)
    assert diff.record.unmatched == []
    assert all(row.n_changed == 2 * row.shape[1] for row in rows_of(diff).values())
    same = with_tables(base, tmp_path / "same", [*WORDS, "<|im_start|>"], lambda t: t)
    assert weight_diff(base, same).summary.verdict == "identical"


def test_the_tokenizer_beside_an_adapter_counts(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", WORDS)
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert weight_diff(base, tmp_path / "adapter").summary.n_moved_tokens == 0
    words([WORDS[1], WORDS[0], *WORDS[2:]]).save_pretrained(tmp_path / "adapter")
    diff = weight_diff(base, tmp_path / "adapter")
    assert diff.summary.n_moved_tokens == 2
    assert rows_of(diff)["embed"].n_changed > 0


def test_the_same_tokens_in_other_files_are_the_same(base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}", "note": 1}))
    diff = weight_diff(base, other)
    assert (diff.summary.verdict, diff.notes) == ("identical", [])


WITHOUT: Mapping[str, tuple[bool, str]] = {
    "neither": (False, "base brings no tokenizer"),
    "fine-tuned": (True, "fine-tuned brings no tokenizer"),
}


@pytest.mark.parametrize("who", WITHOUT)
def test_without_a_tokenizer_rows_are_compared_by_number_and_that_is_said(who: str, tmp_path: Path) -> None:
    has_one, reason = WITHOUT[who]
    base = saved(tmp_path / "base", WORDS if has_one else None)
    other = with_tables(base, tmp_path / "other", None, lambda t: t + 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink(missing_ok=True)
    (note,) = weight_diff(base, other).notes
    assert note.startswith(f"rows of embed, lm_head were compared by their number and not by token: {reason}")
    longer = with_tables(other, tmp_path / "longer", None, lambda t: torch.cat([t, t[:2]]))
    notes = weight_diff(base, longer).notes
    assert all(f"were compared by their number and not by token: {reason}" in note for note in notes)
    assert len(notes) == 2
    same = with_tables(base, tmp_path / "same", None, lambda t: t)
    assert weight_diff(base, same).notes == []


def test_a_tokenizer_that_cannot_be_read_is_said(base: Path, tmp_path: Path) -> None:
    other = with_tables(base, tmp_path / "other", None, lambda t: t + 1)
    (other / "tokenizer.json").write_text("{")
    (note,) = weight_diff(base, other).notes
    assert "the tokenizer of fine-tuned cannot be read" in note


def test_picked_rows_are_those_of_indexing() -> None:
    generator = np.random.default_rng(0)
    for shape in ((30, 5), (30,), (30, 2, 3)):
        tensor = torch.from_numpy(generator.normal(size=shape))
        for index in (np.arange(12), generator.permutation(30), np.array([3, 4, 5, 9, 0, 1])):
            view = PickedRows(MemoryView(tensor, "float64"), index.astype(np.int64))
            expected = tensor[index].reshape(view.matrix)
            assert view.shape == tuple(tensor[index].shape)
            for start in range(0, view.matrix[0], 4):
                stop = min(start + 4, view.matrix[0])
                assert torch.equal(view.read(start, stop), expected[start:stop])
