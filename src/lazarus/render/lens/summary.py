"""The summary of two lenses, in sentences."""

from __future__ import annotations

import math

from lazarus.render.base.escape import escaped
from lazarus.render.lens.tokens import quoted_token
from lazarus.results import CompareRecord, LensModel, LensPair, LensToken

CONTEXT = 60
"""characters of the prompt before the token that is read"""
LEAST_JS = 1e-12
"""below it the two distributions differ by rounding only"""


def summary_lines(record: CompareRecord) -> list[str]:
    """The first choices, and where the two lenses part.

    What their distance means where the vocabularies differ is among the record's notes.
    """
    lines = [place_read(record), first_choices(record), parting(record), by_layers(record)]
    return [escaped(line) for line in lines if line]


def place_read(record: CompareRecord) -> str:
    """Return the token at which the two part, with what stands before it; empty for the last of a prompt."""
    if record.settings.at != "parting" or record.position is None or "no-parting" in record.note_codes:
        return ""
    before = "".join(record.model1.prompt_tokens)[-CONTEXT:]
    where = f"Read where first choices first differ: after token {record.position}"
    return f"{where}, where the text ends in {quoted_token(before)}"


def last_choice(model: LensModel) -> LensToken | None:
    """The token that a model ends with; None where its last layer has none."""
    top = model.layers[-1].top
    return top[0] if top else None


def names(record: CompareRecord) -> tuple[str, str]:
    """Return what the two models are called, told apart where they bear the same name."""
    one, other = (escaped(model.info.id) for model in (record.model1, record.model2))
    return (f"{one} (1)", f"{other} (2)") if one == other else (one, other)


def first_choices(record: CompareRecord) -> str:
    """Return whether both end with the same token, and which."""
    one, other = last_choice(record.model1), last_choice(record.model2)
    if record.summary.same_first_choice is None or one is None or other is None:
        return "First choice: not known, since not every final probability is finite"
    if record.summary.same_first_choice:
        return f"First choice: both end with {quoted_token(one.token)}"
    first, second = names(record)
    return (
        f"First choice: {first} ends with {quoted_token(one.token)}, {second} with "
        f"{quoted_token(other.token)}"
    )


def parting(record: CompareRecord) -> str:
    """The layer where the two lenses differ most."""
    layer, most = record.summary.most_divergent_layer, record.summary.max_js
    if layer is None or most is None:
        return "Largest difference: not measured"
    if most <= LEAST_JS:
        return f"Largest difference: none; both lenses read the same at {read_layers(record)}"
    pair = next(pair for pair in record.layers if pair.layer == layer)
    return (
        f"Largest difference: {place(record, pair)}, JS {most:.4f} nats (at most {math.log(2):.4f}), "
        f"KL(1‖2) {_kl(pair.kl_1_2)}, KL(2‖1) {_kl(pair.kl_2_1)}"
    )


def read_layers(record: CompareRecord) -> str:
    """Return `every layer`, or how many were read of how many."""
    n_read, n_layers = sum(pair.js is not None for pair in record.layers), len(record.layers)
    return "every layer" if n_read == n_layers else f"the {n_read} of {n_layers} layers that were read"


def place(record: CompareRecord, pair: LensPair) -> str:
    """`layer 5`, or where the depths differ `layer 5 of model 1, layer 11 of model 2`."""
    if record.model1.info.n_layers == record.model2.info.n_layers:
        return f"layer {pair.layer}"
    return f"layer {pair.layer} of model 1, layer {pair.model2_layer} of model 2"


def by_layers(record: CompareRecord) -> str:
    """At how many layers the two read another first choice; empty where that is not known."""
    known = [pair for pair in record.layers if pair.same_first_choice is not None]
    differ = [pair for pair in known if not pair.same_first_choice]
    if not known:
        return ""
    told = f"First choices by layer: differ at {len(differ)} of {len(known)}"
    return f"{told}, first at {place(record, differ[0])}" if differ else told


def title(record: CompareRecord, index: int) -> str:
    """The name of a tracked token: the models' own token, with its leading space, or the word as given.

    A word of which only the first token is tracked keeps its own text, and so does one that is another token
    in either model; the notes say what is tracked instead.
    """
    given = record.tracked[index]
    found = {model.tracked[index].token for model in (record.model1, record.model2)} - {None}
    own = found.pop() if len(found) == 1 else None
    return own if own is not None and own.strip() == given.strip() else given


def _kl(value: float | None) -> str:
    """KL where JS is known: what is null then is infinite."""
    return "inf" if value is None else f"{value:.4f}"
