"""What two lenses say together, in sentences."""

from __future__ import annotations

import math

from lazarus.render.escape import escaped
from lazarus.render.lens.tokens import quoted_token
from lazarus.results import CompareRecord, LensModel, LensPair, LensToken

LEAST_JS = 1e-12
"""below it the two distributions differ by rounding only"""


def summary_lines(record: CompareRecord) -> list[str]:
    """The first choices, where the two lenses part, and what their distance means."""
    lines = [first_choices(record), parting(record), by_layers(record)]
    if not record.summary.same_vocabulary:
        lines.append(
            "Vocabularies: the two differ, so KL and JS compare tokens by their text; what only one model "
            "has counts as a token that the other never gives."
        )
    return [line for line in [*lines, *_renamed(record)] if line]


def last_choice(model: LensModel) -> LensToken | None:
    """The token that a model ends with; None where its last layer has none."""
    top = model.layers[-1].top
    return top[0] if top else None


def names(record: CompareRecord) -> tuple[str, str]:
    """What the two models are called, told apart where they bear the same name."""
    one, other = (escaped(model.info.id) for model in (record.model1, record.model2))
    return (f"{one} (1)", f"{other} (2)") if one == other else (one, other)


def first_choices(record: CompareRecord) -> str:
    """Whether both end with the same token, and which."""
    one, other = last_choice(record.model1), last_choice(record.model2)
    if record.summary.same_first_choice is None or one is None or other is None:
        return "First choice: not known, since not every final probability is finite."
    if record.summary.same_first_choice:
        return f"First choice: both end with {quoted_token(one.token)}."
    first, second = names(record)
    return (
        f"First choice: {first} ends with {quoted_token(one.token)}, {second} with "
        f"{quoted_token(other.token)}."
    )


def parting(record: CompareRecord) -> str:
    """The layer where the two lenses differ most."""
    layer, most = record.summary.most_divergent_layer, record.summary.max_js
    if layer is None or most is None:
        return "Largest difference: not measured."
    if most <= LEAST_JS:
        return "Largest difference: none; both lenses read the same at every layer."
    pair = next(pair for pair in record.layers if pair.layer == layer)
    return (
        f"Largest difference: {place(record, pair)}, JS {most:.4f} nats (at most {math.log(2):.4f}), "
        f"KL(1‖2) {_number(pair.kl_1_2)}, KL(2‖1) {_number(pair.kl_2_1)}."
    )


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
    return f"{told}, first at {place(record, differ[0])}." if differ else f"{told}."


def title(record: CompareRecord, index: int) -> str:
    """What a tracked token is called: the models' own token where they agree on it, else what was given."""
    found = {model.tracked[index].token for model in (record.model1, record.model2)} - {None}
    (token,) = found if len(found) == 1 else (record.tracked[index],)
    return record.tracked[index] if token is None else token


def _renamed(record: CompareRecord) -> list[str]:
    """Where a word is tracked by another token than itself, with or without its leading space."""
    lines = []
    for index, given in enumerate(record.tracked):
        tokens = [model.tracked[index].token for model in (record.model1, record.model2)]
        own = [token for token in tokens if token is not None]
        if len(set(own)) > 1 or any(token.strip() != given.strip() for token in own):
            told = " and ".join(quoted_token(token) for token in dict.fromkeys(own))
            lines.append(f"Tracked: {quoted_token(given)} is read by its first token, {told}.")
    return lines


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"
