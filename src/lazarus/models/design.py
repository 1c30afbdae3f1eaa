"""Tells whether two models are of one design, so that they differ in their weights alone."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

_INERT = {"_name_or_path", "dtype", "transformers_version", "architectures", "use_cache"}
"""Entries of a configuration, and of those inside it, that do not change how blocks behave."""
_NOT_STORED = ("_attn_implementation", "_experts_implementation")
"""What shapes the computation and is not among a configuration's entries, because it is not saved."""


def same_design(base: PreTrainedModel, finetuned: PreTrainedModel) -> bool:
    """Return whether both are of one class and one configuration: then the blocks of both behave alike."""
    return type(base) is type(finetuned) and same_config(base.config, finetuned.config)


def same_config(base: PretrainedConfig, finetuned: PretrainedConfig) -> bool:
    """Return whether two configurations are equal in all that shapes the computation."""
    return shaping(base) == shaping(finetuned)


def shaping(config: PretrainedConfig) -> dict[str, Any]:
    """Return the entries of a configuration that shape the computation; None counts as absent."""
    # From the attributes: `to_dict` makes plain dicts of the configurations inside, of what is stored alone.
    inside = {name: value for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    entries = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _INERT and name not in inside and value is not None
    }
    not_stored = {name: getattr(config, name, None) for name in _NOT_STORED}
    return {**entries, **not_stored, **{name: shaping(value) for name, value in inside.items()}}
