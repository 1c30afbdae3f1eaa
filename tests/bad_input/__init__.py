"""Every kind of bad input that the command must refuse with one message, as data.

kind.py      what a kind is: the mistake, how to make it, and what must come of it
outcome.py   running one, here or in a process of its own
page.py      the page of the documentation, written from both
"""

from bad_input import (
    adapters,
    checkpoints,
    formats,
    ggufs,
    models,
    options,
    outputs,
    pairs,
    prompts,
    saved,
    siblings,
    strangers,
)
from bad_input.kind import BadInput, compare
from bad_input.outcome import Outcome, alone, here, observe
from bad_input.page import page

SUBJECTS: dict[str, tuple[BadInput, ...]] = {
    "Options": options.KINDS,
    "Prompts": prompts.READING,
    "Prompts and the models": prompts.FITTING,
    "Outputs": (*outputs.KINDS, *outputs.VECTORS),
    "Saved results": saved.KINDS,
    "Naming a model": models.NAMES,
    "A model's configuration": models.CONFIGURATIONS,
    "A model's weights": checkpoints.KINDS,
    "Models in another form": formats.KINDS,
    "A GGUF file": ggufs.KINDS,
    "Adapters": adapters.KINDS,
    "Tokenizers": pairs.TOKENIZERS,
    "Files that attack": strangers.KINDS,
    "The pair": pairs.KINDS,
    "weight-diff": siblings.WEIGHT_DIFF,
    "compare": siblings.COMPARE,
}

__all__ = ["SUBJECTS", "BadInput", "Outcome", "alone", "compare", "here", "observe", "page"]
