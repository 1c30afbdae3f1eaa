"""A model that makes itself ready when it first runs as a whole, and of which only the text stack is run.

Quantisers may leave weights packed until then (compressed-tensors: a forward pre-hook on the model), and
other libraries put a `forward` of their own on it. What they do is done once before anything is compared.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from lazarus.blame import Translated, one_line
from lazarus.errors import UnsupportedModelError
from lazarus.notes import Notes

_N_TOKENS = 4


def is_hooked(model: PreTrainedModel, stack: nn.Module) -> bool:
    """Return whether something is hooked to the whole model that would not run with the stack alone."""
    around = (m for m in model.modules() if m is not stack and any(each is stack for each in m.modules()))
    # A `forward` among the attributes of an instance was put there by another library.
    return any(module._forward_pre_hooks or "forward" in vars(module) for module in around)


def run_once_whole(model: PreTrainedModel, stack: nn.Module, name: str, notes: Notes) -> None:
    """Run a model once on a few tokens, where something is hooked to it outside of its stack.

    It is noted if it cannot be run so: what is hooked there may not have been done. The decoder of an
    encoder-decoder asks for more than the tokens that its encoder reads, so such a model is left as it is.
    """
    if model.config.is_encoder_decoder or not is_hooked(model, stack):
        return

    def tell(error: BaseException) -> UnsupportedModelError:
        return UnsupportedModelError(one_line(error) or type(error).__name__)

    ids = torch.zeros(1, _N_TOKENS, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad(), Translated(f"the first pass of {name}", tell):
            model(input_ids=ids)
    except UnsupportedModelError as error:
        notes.add(
            "hooked-model",
            f"{name}: something is hooked to the whole model, which does not run on token ids alone "
            f"({error}): if it makes weights ready, they may not be",
            model=name,
        )
