"""The place of a transformers model's blocks: found by structure, not by a list of families."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lazarus.blame import Translated
from lazarus.errors import BlocksNotFoundError
from lazarus.messages import option
from lazarus.notes import Notes


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that a comparison needs."""

    stack: nn.Module
    """what is run on token ids: the text stack without an LM head"""
    blocks: tuple[nn.Module, ...]
    """its blocks, in the order in which they are listed"""
    hidden_size: int
    """the configured width"""
    context: int | None
    """the largest number of tokens in a prompt; None where the architecture sets none"""
    picked_keys: int | None
    """how many keys a sparse attention picks for each token; None where it reads all of them"""
    uses_layer_norm: bool
    """its blocks read the residual stream through a LayerNorm"""
    encoder_only: bool = False
    """the stack is the encoder of an encoder-decoder"""

    def note(self, name: str, notes: Notes) -> None:
        """Note what of the model, which is called `name`, is not in the stack."""
        if self.encoder_only:
            told = f"{name}: an encoder-decoder: its encoder is compared, its decoder is not"
            notes.add("encoder-only", told, model=name)


def dissect(model: PreTrainedModel, layers_path: str | None = None) -> Anatomy:
    """Find the text stack and its blocks.

    `layers_path` is the dotted path of the list of blocks from the model, when it cannot be found.

    Raises:
        BlocksNotFoundError: there is no single list of blocks; the message offers the candidates.
    """
    stack = _text_stack(model)
    config = text_config(stack, model)
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise BlocksNotFoundError(
            f"{type(model).__name__}: its configuration has no hidden_size: it is no single stack of "
            "blocks over tokens, and cannot be compared layer by layer."
        )
    blocks = _blocks_at(model, layers_path) if layers_path else _find_blocks(stack, config, model)
    return Anatomy(
        stack=stack,
        blocks=blocks,
        hidden_size=config.hidden_size,
        context=_context(stack, config),
        picked_keys=getattr(config, "index_topk", None),
        uses_layer_norm=any(isinstance(m, nn.LayerNorm) for b in blocks for m in b.modules()),
        encoder_only=model.config.is_encoder_decoder,
    )


def text_config(stack: nn.Module, model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the text stack: its own, or the text part of a multimodal one."""
    config = getattr(stack, "config", model.config)
    return config.get_text_config(decoder=not model.config.is_encoder_decoder)


def block_settings(module: nn.Module, index: int) -> tuple[type, dict[str, Any]]:
    """A module's type, plain attributes and whatever forward was put on it, less the number of its block."""
    plain = {name: v for name, v in vars(module).items() if isinstance(v, int | float | str | None)}
    # Of the type as well: a setting that is True, such as `do_layer_norm_before`, is equal to 1.
    numbered = {name for name, v in plain.items() if type(v) is int and v == index}
    numbers = {name for name in numbered if "layer" in name or "idx" in name}
    settings = {name: v for name, v in plain.items() if name not in numbers}
    return type(module), {**settings, "forward": vars(module).get("forward")}


def _text_stack(model: PreTrainedModel) -> nn.Module:
    backbone = model.base_model
    if model.config.is_encoder_decoder:
        with Translated(f"the encoder of {type(model).__name__}", partial(_told, model)):
            encoder: nn.Module = backbone.get_encoder()
            return encoder
    # Never on the head model: ModernBERT's `decoder` is its head's Linear.
    with Translated(f"the decoder of {type(model).__name__}", partial(_told, model)):
        stack = backbone.get_decoder() if hasattr(backbone, "get_decoder") else backbone
    # `get_decoder` returns whatever has the name `decoder`, such as a ModuleList or a projection.
    if not isinstance(stack, PreTrainedModel):
        stack = backbone
    if stack is model and model.get_output_embeddings() is not None:
        # A model with an LM head that is its own base_model (Llama 4): the stack is the model inside it.
        stack = next((m for m in model.children() if isinstance(m, PreTrainedModel)), model)
    found: nn.Module = stack
    return found


def _told(model: PreTrainedModel, error: BaseException) -> BlocksNotFoundError:
    return BlocksNotFoundError(
        f"{type(model).__name__}: its own code cannot name its text stack: {error}. It cannot be compared "
        "layer by layer."
    )


def _find_blocks(stack: nn.Module, config: PretrainedConfig, model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return the one ModuleList that is as long as the layer count, or else what transformers records."""
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = {name: m for name, m in stack.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    # A list inside another one, such as the experts of a block, may happen to have as many modules.
    outer = {k: m for k, m in lists.items() if not any(k.startswith(o + ".") for o in lists)}
    matching = [m for m in outer.values() if len(m) == n_layers]
    if len(matching) == 1:
        return tuple(matching[0])
    recorded = _recorded_class(stack)
    if recorded is not None:
        found = tuple(m for m in stack.modules() if isinstance(m, recorded))
        if found:
            return found
    candidates = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none"
    raise BlocksNotFoundError(
        f"{type(model).__name__}: its blocks cannot be found: no single list of {n_layers} modules. "
        f"Its lists: {candidates}. Name the right one with {option('layers_path')}.",
        option="layers_path",
    )


def _recorded_class(stack: nn.Module) -> type[nn.Module] | tuple[type[nn.Module], ...] | None:
    """Return the class of the modules whose outputs transformers collects as hidden states."""
    recorders = getattr(stack, "_can_record_outputs", None) or {}
    target = recorders.get("hidden_states")
    # An entry is a class itself, or a recorder that names one.
    target = getattr(target, "target_class", target)
    return target if isinstance(target, type | tuple) else None


def _blocks_at(model: PreTrainedModel, path: str) -> tuple[nn.Module, ...]:
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, nn.ModuleList) or not len(found):
        lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise BlocksNotFoundError(
            f"{option('layers_path', path)}: no list of blocks there in {type(model).__name__}. "
            f"Name one of its lists: {', '.join(lists) or 'it has none'}.",
            option="layers_path",
        )
    return tuple(found)


def _context(stack: nn.Module, config: PretrainedConfig) -> int | None:
    """Return how many positions the model has; RoBERTa and its kin count theirs from padding_idx + 1."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    for name, module in stack.named_modules():
        is_table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:
            return limit - int(module.padding_idx) - 1
    return limit
