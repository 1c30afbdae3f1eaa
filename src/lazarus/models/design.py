"""Whether two models are of one design: then only their weights can make them behave differently."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_INERT = {
    "_name_or_path",
    "dtype",
    "transformers_version",
    "architectures",
    "use_cache",
    "quantization_config",
}
"""Entries of a configuration that do not change how blocks behave."""


def same_design(base: PreTrainedModel, finetuned: PreTrainedModel) -> bool:
    """Whether both are of one class and one configuration: then the blocks of both behave alike."""
    return type(base) is type(finetuned) and same_config(base.config, finetuned.config)


def same_config(base: PretrainedConfig, finetuned: PretrainedConfig) -> bool:
    """Whether two configurations are equal in all that shapes the computation."""
    one, other = base.to_dict(), finetuned.to_dict()
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} <= _INERT


def same_structure(base: nn.Module, finetuned: nn.Module) -> bool:
    """Whether two modules have the same submodules, by name and type; an adapter's layers are others."""
    ours, theirs = ([(name, type(m)) for name, m in each.named_modules()] for each in (base, finetuned))
    return ours == theirs
