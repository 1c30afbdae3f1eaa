"""Tiny real models and tokenizers, built from transformers' own classes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lazarus.metrics import CkaRows, Directions, PromptMeans, SiteMeasures
from lazarus.notes import CODES

M = TypeVar("M", bound=PreTrainedModel)
A = TypeVar("A", PromptMeans, CkaRows, Directions, SiteMeasures)

OF_THE_RUN = {"common-blocks", "repeated-prompts", "few-prompts", "alike-prompts", "dominant-dimension"}

TEXT = (
    "Hello, how are you? What is AI? The answer is 42, and the capital of France is Paris.",
    "Calculate 2 + 2. Write a Python function that returns a list of the first ten primes.",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tiny_tokenizer(vocabulary: int = 300, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 entries that puts a BOS in front."""
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocabulary)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    wrapped.chat_template = template
    return wrapped


@cache
def _trained(vocabulary: int) -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>"]
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return str(core.to_str())


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Four blocks of width 32, random weights large enough for the tokens to mix."""
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def perturbed(model: M, amount: float = 0.1, seed: int = 1) -> M:
    """A copy with noise of `amount` times each matrix's own scale on every matrix."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * amount)
    return changed


def save_model(folder: Path, model: PreTrainedModel, tokenizer: Any | None = None, **options: Any) -> Path:
    """Save as a user would; returns the folder."""
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """`t5 t17` → 5, 17: texts that spell token ids, without special tokens."""
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(100)}, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0")


def notes_on_models(diff: Any) -> list[str]:
    """The notes of a result but those that follow from few or repeated prompts, or from toy states."""
    notes = zip(diff.notes, diff.note_codes, strict=True)
    return [note for note, code in notes if code not in OF_THE_RUN]


def notes_of(result: Any, *codes: str) -> list[str]:
    """The notes of a result with these codes."""
    assert codes
    assert set(codes) <= CODES.keys()
    return [note for note, code in zip(result.notes, result.note_codes, strict=True) if code in codes]


def joined(one: A, *others: A) -> A:
    """Return an accumulator that has seen what all of these have seen, from their states."""
    found = copy.deepcopy(one)
    for other in others:
        found.add(other.state())
    return found


def let_head_see_tokens(model: Any) -> None:
    """Let the logits depend on the token ids too: such a head cannot be run by itself."""
    plain = model.forward

    def peeking(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = plain(input_ids=input_ids, **kwargs)
        output.logits = output.logits + input_ids[..., None]
        return output

    model.forward = peeking
