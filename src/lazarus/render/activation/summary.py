"""The summary under the table: what the numbers say together, in a few plain lines."""

from __future__ import annotations

import math

import numpy as np

from lazarus.render.activation.attribution import attribution_lines
from lazarus.render.activation.components import component_lines
from lazarus.render.activation.scores import OUTPUTS, score_line
from lazarus.render.base.escape import PROMPT_CHARACTERS, escaped
from lazarus.render.base.words import short, times
from lazarus.results import ActivationDiffRecord, differing, told

MOST_LINES = 9
BLOCKS_NAMED = 3
TOKENS_NAMED = 6


def summary_lines(record: ActivationDiffRecord) -> list[str]:
    """At most nine lines, and one for each option that measures more; the JSON has all of it."""
    found = record.summary
    lines = [] if found.verdict is None else [f"Verdict: {verdict(record)}"]
    lines += [*_most_divergent(record), _where(record), *_blocks(record), *component_lines(record)]
    lines += [
        *attribution_lines(record),
        *_output(record),
        *_partings(record),
        *_groups(record),
        *_readout(record),
    ]
    spare = MOST_LINES - len(lines) - 1
    lines += _spread(record)[: max(0, spare)]
    # At the end, so that no field of a result can add a line of its own.
    return [escaped(line) for line in (*lines, _what_was_compared(record))]


def verdict(record: ActivationDiffRecord) -> str:
    """The verdict in a sentence or two, and for what reason nothing may have changed."""
    others = told(differing(record.base.not_compared, record.finetuned.not_compared))
    match record.summary.verdict:
        case "identical" if others:
            return f"identical in what was compared, bit for bit at every site; {others}"
        case "identical":
            return f"IDENTICAL, nothing changed: bit for bit the same at every site{_weights(record)}"
        case "within_noise" if others:
            return f"within noise in what was compared: {_largest(record)}; {others}{_coarse(record)}"
        case "within_noise":
            return f"WITHIN NOISE, no change above it: {_largest(record)}{_weights(record)}{_coarse(record)}"
        case "within_rounding":
            where = f" in what was compared; {others}" if others else ""
            return f"within rounding of the stored weights{where}: {_largest(record)}{_causes(record)}"
        case "changed":
            return f"changed: {_largest(record)}"
        case None:
            return "none: the noise was not measured, or states or logits are not finite"


def _weights(record: ActivationDiffRecord) -> str:
    same = record.summary.weights_identical
    told = {True: "; the weights are the same too", False: "; the weights differ", None: ""}[same]
    return told + _causes(record)


def _causes(record: ActivationDiffRecord) -> str:
    causes = "; ".join(record.summary.causes)
    return f". Likely cause: {escaped(causes)}" if causes else ""


def _coarse(record: ActivationDiffRecord) -> str:
    """Say that a light fine-tune disappears in the noise of a narrow dtype."""
    if record.settings.dtype == "float32":
        return ""
    return f". The noise of {record.settings.dtype} hides light changes: run with --dtype float32"


def _largest(record: ActivationDiffRecord) -> str:
    """The largest change of those above their floor; the nearest to its floor, where none is."""
    places = [
        *((f"layer {layer.layer}", layer.relative_l2, layer.noise_floor) for layer in record.layers),
        *((site.name.replace("_", " "), site.relative_l2, site.noise_floor) for site in record.sites),
    ]
    output = record.output
    if output is not None and output.scores is not None:
        places.append((OUTPUTS[output.kind], output.scores.relative_l2, output.noise_floor))
    elif output is not None:
        places.append(("the logits", output.logits_relative_l2, output.noise_floor))
    measured = [(name, value, floor) for name, value, floor in places if value is not None and floor]
    above = [place for place in measured if place[1] > place[2]]
    if record.summary.verdict == "changed" and not above:
        if (
            output is not None
            and output.scores is None
            and None
            in (
                output.kl_base_finetuned,
                output.kl_finetuned_base,
            )
        ):
            return "one model can give next tokens that the other cannot; see the notes"
        return "the two have states that cannot be compared; see the notes"
    # Of sites above their floors the largest change counts; where none is, the one that comes nearest.
    name, value, floor = max(above or measured, key=lambda place: place[1] if above else place[1] / place[2])
    return f"relative L2 {short(value)} at {name}, {times(value / floor)} the noise floor"


def _most_divergent(record: ActivationDiffRecord) -> list[str]:
    layer = record.summary.most_divergent_layer
    if layer is None:
        return []
    found = record.layers[layer]
    if not found.divergence:
        return ["No layer diverges"]
    told = f"divergence {short(found.divergence)}"
    if found.interval is not None:
        told += f", 95 % interval {short(found.interval[0])} to {short(found.interval[1])}"
    if found.unrelated_similarity is not None:
        told += f"; unrelated prompts: {short(1 - found.unrelated_similarity)}"
    return [f"Most divergent layer: {layer} ({told})"]


def _where(record: ActivationDiffRecord) -> str:
    found, threshold = record.summary, record.settings.threshold
    first = found.first_flagged_layer
    line = (
        f"No layer above the threshold of {threshold:g}"
        if first is None
        else f"First layer above {threshold:g}: {first}"
    )
    if found.onset_layer is not None:
        line += (
            f"; the models part at layer {found.onset_layer}: from there on every interval is above the noise"
        )
    return line


_WITHIN_NOISE = "Largest local changes, within the noise"


def _blocks(record: ActivationDiffRecord) -> list[str]:
    """The blocks whose own weights did it, the most changed first."""
    if not record.settings.localize:
        return []
    local = {layer.layer: layer.local for layer in record.layers if layer.local}
    changes = [(layer, change.relative_l2 or 0.0) for layer, change in local.items() if not change.is_noise]
    n_noise = sum(change.is_noise and bool(change.relative_l2) for change in local.values())
    changed = sorted((c for c in changes if c[1] > 0), key=lambda change: -change[1])
    if not changed:
        why = "every block's own change is noise" if n_noise else "no block's own output changes"
        if record.summary.verdict == "changed" and record.settings.position not in ("all", "mean"):
            why += " at the compared tokens: --position all looks at every one"
        return [f"Blocks that did it: none, {why}"]
    named = ", ".join(f"{layer} ({short(value)})" for layer, value in changed[:BLOCKS_NAMED])
    others = len(changed) - BLOCKS_NAMED
    rest = len(local) - n_noise - len(changed)
    line = f"{_did_it(record)}: {named}" + (f" and {others} more" if others > 0 else "")
    line += f"; exactly 0 in the other {rest}" if rest else ""
    return [line + (f"; within its noise in {n_noise}" if n_noise else "")]


def _did_it(record: ActivationDiffRecord) -> str:
    if record.summary.verdict == "within_noise":
        has_floors = any(layer.local and layer.local.noise_floor is not None for layer in record.layers)
        return "Blocks that differ by more than their own noise" if has_floors else _WITHIN_NOISE
    is_quantised = "quantised-pair" in record.note_codes
    return "Blocks that cost most, by their local change" if is_quantised else "Blocks that did it"


def _output(record: ActivationDiffRecord) -> list[str]:
    found = record.output
    if found is not None and found.scores is not None:
        return [score_line(found, found.scores)]
    if found is None or found.top1_agreement is None:
        return []
    return [
        f"Next token: first choices agree on {found.top1_agreement:.0%} of {units(record)}; "
        f"KL(base‖fine-tuned) {_nats(found.kl_base_finetuned)} nats, "
        f"KL(fine-tuned‖base) {_nats(found.kl_finetuned_base)}"
    ]


def units(record: ActivationDiffRecord) -> str:
    """Return what a share of next tokens is of: prompts, or their tokens where several are compared."""
    return "tokens" if record.settings.position in ("all", "response") else "prompts"


def _partings(record: ActivationDiffRecord) -> list[str]:
    """Return in how many of the traced prompts first choices part, and the first place where they do."""
    # Of a prompt of which no logits are finite it is not known.
    traces = [trace for trace in record.tokens or [] if any(each is not None for each in trace.agrees or [])]
    partings = [(trace.prompt_index, trace.parting) for trace in traces if trace.parting is not None]
    if not traces:
        return []
    line = (
        f"Token by token: first choices differ in {len(partings)} of the {len(traces)} prompts that are kept"
    )
    near = sum(parting.cause == "noise" for _, parting in partings)
    line += f", {near} of them by a near-tie within the noise" if near else ""
    if partings:
        prompt, first = next((each for each in partings if each[1].cause != "noise"), partings[0])
        base, finetuned = (escaped(repr(token)) for token in (first.token_base, first.token_finetuned))
        line += f"; in prompt {prompt} after token {first.position} base says {base}, fine-tuned {finetuned}"
    return [line]


def _nats(kl: float | None) -> str:
    """A KL divergence: null is infinite where the output was measured."""
    return "infinite" if kl is None else short(kl)


def _groups(record: ActivationDiffRecord) -> list[str]:
    """The contrast that is surest, in a line."""
    contrasts = [c for c in record.groups.contrasts if c.layer is not None] if record.groups else []
    if not contrasts:
        return []
    best = min(contrasts, key=lambda c: (1.0 if c.p_value is None else c.p_value, c.group_b))
    assert best.layer is not None
    ratio = math.exp(best.log_ratio[best.layer] or 0.0)
    line = (
        f"Groups: {escaped(best.group_a)} diverges {ratio:.2g} times as much as {escaped(best.group_b)} at "
        f"layer {best.layer}"
    )
    return [line if best.p_value is None else f"{line} (p = {best.p_value:.2g}, over all layers)"]


def _readout(record: ActivationDiffRecord) -> list[str]:
    """The tokens that are mined from the logits, and those of the mean difference at the last layer read."""
    if not record.readout:
        return []
    last = record.readout[-1]
    tokens = " ".join(escaped(repr(token.token)) for token in last.finetuned_promoted[:TOKENS_NAMED])
    line = f"the mean difference at layer {last.layer} promotes {tokens or 'nothing'}"
    if record.mined is not None:
        mined = " ".join(
            f"{escaped(repr(token.token))} {token.frequency:.0%}"
            for token in record.mined.promoted[:TOKENS_NAMED]
        )
        line = f"most often promoted are {mined or 'no tokens'}; {line}"
    if last.static_share is not None:
        line += f"; one static shift is {last.static_share:.0%} of the change"
    return [f"Readout: {line}"]


def _spread(record: ActivationDiffRecord) -> list[str]:
    """Between which prompts the mean of the most divergent layer lies."""
    layer = record.summary.most_divergent_layer
    if layer is None or len(record.prompts) == 1 or not record.summary.max_divergence:
        return []
    values = record.results.column("divergence")[:, layer]
    ends = [int(np.nanargmin(values)), int(np.nanargmax(values))]
    least, most = (
        f"{short(float(values[i]))} ({escaped(record.prompts[i].text[:PROMPT_CHARACTERS])}...)" for i in ends
    )
    return [f"Prompts at layer {layer}: from {least} to {most}"]


def _what_was_compared(record: ActivationDiffRecord) -> str:
    settings = record.settings
    tokens = {
        "last": "the last token of each prompt",
        "mean": "the mean over each prompt's tokens",
        "all": "every token, averaged within each prompt",
        "response": "every token of the response and the one before it, averaged within each prompt",
    }.get(settings.position, f"token {settings.position} of each prompt")
    return f"Compared: {tokens}, in {settings.dtype} on {settings.device}"
