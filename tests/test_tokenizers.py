"""Whose tokenizer reads the prompts, what a chat template makes of them, and how long they may be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from factories import TEMPLATE, notes_of, notes_on_models, perturbed, save_model, tiny_llama, tiny_tokenizer
from layouts import compare
from lazarus import ActivationDiff, activation_diff
from lazarus import compare as lens
from lazarus.errors import (
    LazarusError,
    ModelNotFoundError,
    PairError,
    PromptTooLongError,
    TokenizerMismatchError,
    UsageError,
)
from lazarus.models import ChatTemplate, render_chats
from lazarus.notes import Notes
from lazarus.prompts import make_prompts
from lazarus.tokens import TokenOptions, tokenize_pair

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hello"}]},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am"}]},
]


def tuned(folder: Path, tokenizer: Any | None = None) -> Path:
    return save_model(folder, perturbed(tiny_llama()), tokenizer)


@pytest.fixture(scope="module")
def expected(base_folder: Path, finetuned_folder: Path) -> ActivationDiff:
    return compare(base_folder, finetuned_folder)


# --- Whose tokenizer


def test_one_tokenizer_serves_both_if_one_model_has_none(
    tmp_path: Path, base_folder: Path, finetuned_folder: Path, expected: ActivationDiff
) -> None:
    bare, bare_base = tuned(tmp_path / "bare"), save_model(tmp_path / "bare base", tiny_llama())
    for lacking, diff in (
        (bare, compare(base_folder, bare)),
        (bare_base, compare(bare_base, finetuned_folder)),
    ):
        assert diff.results == expected.results
        assert notes_on_models(diff) == [
            f"{lacking} brings no tokenizer; the other model's was used for both"
        ]
    with pytest.raises(PairError, match="brings a tokenizer"):
        compare(bare_base, bare)
    assert notes_on_models(compare(bare_base, bare, tokenizer=tiny_tokenizer())) == []


def test_other_vocabularies_that_give_the_same_ids_are_noted(
    tmp_path: Path, base_folder: Path, expected: ActivationDiff
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    diff = compare(base_folder, tuned(tmp_path / "tuned", tokenizer))
    assert diff.results == expected.results
    [note] = notes_on_models(diff)
    assert "vocabularies differ: 1; they give the same ids for these prompts" in note


def test_other_ids_are_refused(tmp_path: Path, base_folder: Path) -> None:
    folder = tuned(tmp_path / "tuned", tiny_tokenizer(vocabulary=280))
    with pytest.raises(TokenizerMismatchError, match=r"Prompt 0 \('Hello, how are you\?'\)"):
        compare(base_folder, folder)


def test_a_padding_and_a_truncation_in_the_file_do_nothing(
    tmp_path: Path, base_folder: Path, expected: ActivationDiff
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=20, pad_id=2, pad_token="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(max_length=5)
    folder = tuned(tmp_path / "tuned")
    tokenizer.save_pretrained(folder)
    assert '"max_length": 5' in (folder / "tokenizer.json").read_text()
    assert '"Fixed": 20' in (folder / "tokenizer.json").read_text()
    for base in (base_folder, save_model(tmp_path / "base", tiny_llama(), tokenizer)):
        diff = compare(base, folder)
        assert diff.results == expected.results
        assert [prompt.n_tokens for prompt in diff.prompts] == [15, 7]
        assert notes_on_models(diff) == []


# --- A tokenizer that the caller gives


def in_memory() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_llama(), perturbed(tiny_llama())


def test_a_tokenizer_is_given_by_itself_by_its_name_or_in_a_processor(
    tmp_path: Path, base_folder: Path, expected: ActivationDiff
) -> None:
    alone = tmp_path / "tokenizer alone"
    tiny_tokenizer().save_pretrained(alone)
    processor = SimpleNamespace(tokenizer=tiny_tokenizer())
    for given in (tiny_tokenizer(), base_folder, str(base_folder), alone, str(alone), processor):
        diff = compare(*in_memory(), tokenizer=given)
        assert [prompt.n_tokens for prompt in diff.prompts] == [p.n_tokens for p in expected.prompts]
    assert lens(*in_memory(), "Hello", tokenizer=str(alone)).record.model1.prompt_tokens[0] == "<s>"


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        (
            42,
            UsageError,
            "tokenizer=42: neither a tokenizer of transformers nor the name of one, but of the class int",
        ),
        (PreTrainedTokenizerFast, UsageError, "of the class type"),
        ({"vocab": {}}, UsageError, "of the class dict"),
        (tiny_tokenizer().backend_tokenizer, UsageError, "of the class Tokenizer"),
        ("", UsageError, "tokenizer='': neither"),
        ("no/such", ModelNotFoundError, "no/such: no such folder or file here, not in the cache"),
        ("no/such folder", ModelNotFoundError, "'no/such folder': no such folder or file, and not a Hub id"),
    ],
)
def test_what_is_no_tokenizer_is_refused_before_a_model_is_loaded(
    given: Any, kind: type[LazarusError], says: str
) -> None:
    for run in (activation_diff, lens):
        with pytest.raises(kind, match=says):
            run("not loaded", "not loaded", "Hello", tokenizer=given)


def test_a_folder_without_a_tokenizer_is_told_of(tmp_path: Path) -> None:
    bare = save_model(tmp_path / "bare", tiny_llama())
    with pytest.raises(UsageError, match=r"tokenizer='.*bare': no files of a tokenizer are there"):
        compare(*in_memory(), tokenizer=bare)


# --- Chat templates


@pytest.mark.parametrize("template", ["base", "finetuned", "file"])
def test_a_template_gives_both_models_one_text_with_one_bos(
    template: str, tmp_path: Path, base_folder: Path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{{ messages[0]['content'] }}?", encoding="utf-8")
    other = tiny_tokenizer(template="{{ bos_token }}{{ messages[0]['content'] }}!")
    folder = tuned(tmp_path / "tuned", other)
    diff = compare(base_folder, folder, chat_template=str(file) if template == "file" else template)
    wanted = {
        "base": "<s>[user] What is AI?\n[assistant] ",
        "finetuned": "<s>What is AI?!",
        "file": "<s>What is AI??",
    }
    assert diff.prompts[1].rendered == wanted[template]
    assert diff.prompts[1].text == "What is AI?"
    ids = tiny_tokenizer()(wanted[template], add_special_tokens=False)["input_ids"]
    assert ids.count(0) == 1
    assert diff.prompts[1].n_tokens == len(ids)


def test_an_answer_that_is_there_is_not_asked_for_again(base_folder: Path, finetuned_folder: Path) -> None:
    diff = activation_diff(base_folder, finetuned_folder, CHATS, chat_template="base")
    assert [prompt.rendered for prompt in diff.prompts] == [
        "<s>[user] Hello\n[assistant] ",
        "<s>[user] Hello\n[assistant] I am\n",
    ]
    assert [prompt.text for prompt in diff.prompts] == ["Hello", "I am"]


def test_a_rendered_prompt_has_exactly_its_own_ids() -> None:
    tokenizer = tiny_tokenizer()
    one = make_prompts(["Hello"]).prompts
    [plain], _ = tokenize_pair(one, (tokenizer, tokenizer), TokenOptions(), Notes())
    chats = make_prompts(CHATS).prompts
    texts, _ = render_chats(chats, ChatTemplate(tokenizer, "base", TEMPLATE))
    rendered, _ = tokenize_pair(chats, (tokenizer, tiny_tokenizer()), TokenOptions(), Notes(), texts)
    assert plain.ids[0] == 0, "without a template the tokenizer puts a BOS in front"
    for prompt in rendered:
        assert prompt.ids.count(0) == 1
        assert tokenizer.decode(prompt.ids) == prompt.rendered


# --- The context


def marks(n_tokens: int) -> str:
    """A text of so many tokens, the BOS included."""
    return "!" * (n_tokens - 1)


def _roberta() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return RobertaForMaskedLM(
        RobertaConfig(vocab_size=300, max_position_embeddings=64, pad_token_id=2, **sizes)
    )


@pytest.mark.parametrize(("make", "context"), [(tiny_llama, 64), (_roberta, 61)], ids=["llama", "roberta"])
def test_a_prompt_may_be_as_long_as_the_context(make: Any, context: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", make().eval(), tiny_tokenizer())
    full, over = marks(context), marks(context + 1)
    diff = activation_diff(folder, folder, [full])
    outside = notes_of(diff, "not-compared")
    assert (diff.prompts[0].n_tokens, notes_on_models(diff)) == (context, outside)
    assert [layer.divergence for layer in diff.layers] == [0.0] * len(diff.layers)

    words = f"Prompt 1 .* has {context + 1} tokens; the models' context is {context}"
    with pytest.raises(PromptTooLongError, match=words):
        activation_diff(folder, folder, [full, over])

    cut = activation_diff(folder, folder, ["Hello", over, full], truncate=True)
    assert [prompt.n_tokens for prompt in cut.prompts[1:]] == [context, context]
    assert cut.prompts[1].text == over
    assert notes_on_models(cut) == [
        f"prompts cut to the context of {context} tokens: 1 (1 of 3)",
        *outside,
    ]


def test_the_end_is_cut_whatever_side_the_tokenizer_would_cut() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = "left"
    options = TokenOptions(contexts=(6, 6), truncate=True)
    prompts = make_prompts(["Hello, how are you"]).prompts
    [cut], _ = tokenize_pair(prompts, (tokenizer, tokenizer), options, Notes())
    assert list(cut.ids) == tokenizer("Hello, how are you")["input_ids"][:6]
    assert tokenizer.truncation_side == "left"


@pytest.mark.parametrize("contexts", [(6, None), (None, 6)])
def test_a_context_without_a_limit_is_not_told_of(contexts: tuple[int | None, int | None]) -> None:
    prompts = make_prompts(["Hello, how are you?"]).prompts
    pair = (tiny_tokenizer(), tiny_tokenizer(280))
    options = TokenOptions(contexts=contexts, truncate=True, align="text")
    ours, theirs = tokenize_pair(prompts, pair, options, notes := Notes())
    assert len((ours, theirs)[contexts[0] is None][0].ids) == 6
    assert notes.texts == ["prompts cut to the context of 6 tokens: 0 (1 of 1)"]


def test_a_beginning_of_no_token_is_no_prompt() -> None:
    prompts = make_prompts(["日本"]).prompts
    pair = (tiny_tokenizer(), tiny_tokenizer())
    pair[1].add_tokens(["本"])  # else the two would read the same
    for tokenizer in pair:
        tokenizer.backend_tokenizer.post_processor = None  # no BOS
    options = TokenOptions(contexts=(2, 1), truncate=True, align="text")
    with pytest.raises(
        PromptTooLongError, match="no beginning that fits the models' contexts of 2 and 1 tokens"
    ):
        tokenize_pair(prompts, pair, options, Notes())


def test_special_tokens_that_a_template_does_not_write_are_not_told_of() -> None:
    theirs = tiny_tokenizer()
    theirs.add_special_tokens({"bos_token": "<|b|>"})
    prompts = make_prompts(["Hello"]).prompts
    for template, n_notes in (("{{ messages[0]['content'] }}", 0), ("{{ bos_token }}a", 1)):
        texts, _ = render_chats(prompts, ChatTemplate(tiny_tokenizer(), "base", template))
        options = TokenOptions(align="text")
        tokenize_pair(prompts, (tiny_tokenizer(), theirs), options, notes := Notes(), texts)
        told = [note.text for note in notes if note.code == "special-tokens"]
        assert sum("begin and end a text with other tokens ('<s>'" in text for text in told) == n_notes


def test_the_shorter_context_of_the_two_counts(tmp_path: Path, base_folder: Path) -> None:
    longer = save_model(tmp_path / "longer", tiny_llama(max_position_embeddings=128), tiny_tokenizer())
    assert activation_diff(longer, longer, [marks(128)]).prompts[0].n_tokens == 128
    for pair in ((base_folder, longer), (longer, base_folder)):
        with pytest.raises(PromptTooLongError, match="the models' context is 64"):
            activation_diff(*pair, [marks(65)])
