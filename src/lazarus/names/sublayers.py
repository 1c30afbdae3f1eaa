"""The sublayer of a block that a module belongs to, by the names of the tensors in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from lazarus.models import Anatomy
from lazarus.names.components import Namer

Sublayer = Literal["attn", "mlp", "router"]
"""what mixes tokens (attention, a state space, a convolution); what does not; what picks experts"""

_GROUP = re.compile(r"(experts|(shared_)?expert(_\d+)?)\.")
_SUBLAYERS: dict[Sublayer, re.Pattern[str]] = {
    "attn": re.compile(r"(cross_)?attn|ssm|time_mix|lru|mlstm|shortconv"),
    "mlp": re.compile(r"mlp|channel_mix|shared_expert"),
    "router": re.compile(r"router"),
}


def sublayers(model: PreTrainedModel, anatomy: Anatomy) -> Callable[[nn.Module], Sublayer | None]:
    """Return what tells the sublayer of a module: that of most of its tensors; None where none has a name."""
    namer = Namer(model, anatomy)
    # Without duplicates a module that is shared by several blocks has the path of the first of them.
    paths = {module: path for path, module in model.named_modules()}

    def sublayer_of(module: nn.Module) -> Sublayer | None:
        # PEFT keeps the layer that it adapts under this name.
        names = [f"{paths[module]}.{n}".replace(".base_layer.", ".") for n, _ in module.named_parameters()]
        found = Counter(_sublayer(namer.place(name).component) for name in names if namer.is_named(name))
        return found.most_common(1)[0][0] if found else None

    return sublayer_of


def _sublayer(component: str) -> Sublayer | None:
    """Return the sublayer of a standard name.

    >>> _sublayer("experts.mlp_up"), _sublayer("ssm_in"), _sublayer("attn_post_norm"), _sublayer("embed")
    ('mlp', 'attn', 'attn', None)
    """
    name = _GROUP.sub("", component)
    return next((sublayer for sublayer, words in _SUBLAYERS.items() if words.match(name)), None)
