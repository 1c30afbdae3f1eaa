"""The settings in which two configurations differ, and that enter a model's computation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PretrainedConfig

_INERT = {
    # where a configuration came from, and how the model is loaded
    *("name_or_path", "auto_map", "model_type", "torch_dtype", "quantization_config"),
    *("_attn_implementation", "attn_implementation"),
    # sizes: the shapes of tensors tell them, and rows of a vocabulary are counted by themselves
    *("vocab_size", "tie_word_embeddings", "num_labels"),
    # training and generation
    *(
        "initializer_range",
        "initializer_factor",
        "gradient_checkpointing",
        "use_cache",
        "router_aux_loss_coef",
    ),
    *("output_router_logits", "task_specific_params", "finetuning_task", "tokenizer_class"),
    *("prefix", "pretraining_tp", "unsloth_version", "unsloth_fixed"),
}
"""Entries of a configuration that change no hidden state of a model in evaluation mode."""
_COMMON = set(PretrainedConfig().to_dict())
"""what every configuration has, and no architecture computes with"""
_INERT_NAMES = re.compile(
    r".*(_token_id|_token_ids|_token_index|dropout|dropout_prob|_pdrop|_dropout_rate|_loss)"
)


_COUNTING_FROM_PAD = re.compile(
    r"roberta|camembert|data2vec|esm|ibert|longformer|luke|markuplm|mpnet|xlm-roberta|xmod|lilt|layoutlmv3"
    r"|m2m_100|nllb|speech|fsmt|prophetnet|seamless|trocr|kosmos|altclip|bridgetower|clap|xglm|evolla"
)
"""Model types that count positions from the padding id, which is then no setting of the tokenizer alone."""


@dataclass(frozen=True)
class Setting:
    """An entry of both configurations, with its two values; None where a configuration lacks it."""

    name: str
    """its path, such as `rope_parameters.rope_theta`"""
    base: Any
    finetuned: Any

    def __str__(self) -> str:
        for model, value in (("base", self.base), ("fine-tuned", self.finetuned)):
            if isinstance(value, Mapping):
                return f"{self.name} (only {model} has it)"
        return f"{self.name} ({_short(self.base)} in base, {_short(self.finetuned)} in fine-tuned)"


def settings_that_differ(base: PretrainedConfig, finetuned: PretrainedConfig) -> list[Setting]:
    """Return the entries of two configurations that differ and may change a hidden state, in base's order.

    An entry that is not known to be inert counts. A number that was stored in float32, as a GGUF file does,
    is equal to the one that it was rounded from. An entry that is absent is equal to None.
    """
    found = list(_differing(_whole(base), _whole(finetuned), ""))
    kind = str(getattr(base, "model_type", ""))
    ours, theirs = (getattr(config.get_text_config(), "pad_token_id", None) for config in (base, finetuned))
    if ours != theirs and _COUNTING_FROM_PAD.search(kind):
        found.append(Setting("pad_token_id", ours, theirs))
    return found


def _whole(config: PretrainedConfig) -> dict[str, Any]:
    """Return a configuration's entries, with those of its text stack as if they were its own."""
    text = config.get_text_config(decoder=not config.is_encoder_decoder)
    entries = {str(name): value for name, value in config.to_dict().items()}
    nested = [name for name, value in entries.items() if isinstance(value, Mapping)]
    # A multimodal configuration and that of its text model alone are then compared entry by entry.
    own = {name for name in nested if getattr(config, name, None) is text}
    return {name: value for name, value in entries.items() if name not in own} | (
        text.to_dict() if own else {}
    )


def _differing(base: Mapping[Any, Any], finetuned: Mapping[Any, Any], path: str) -> Iterator[Setting]:
    """The entries that differ, by their paths; of nested settings that one side lacks, the whole."""
    for name in dict.fromkeys([*map(str, base), *map(str, finetuned)]):
        ours, theirs = base.get(name), finetuned.get(name)
        if name in _INERT or name in _COMMON or _INERT_NAMES.fullmatch(name):
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differing(ours, theirs, f"{path}{name}.")
        elif not _same(ours, theirs):
            yield Setting(path + name, ours, theirs)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float | int) and not isinstance(other, bool):
        # A GGUF file has its settings in float32, and config.json as they were typed.
        return one == other or bool(np.float32(one) == np.float32(other))
    if isinstance(other, float):
        return isinstance(one, int) and not isinstance(one, bool) and _same(other, one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
