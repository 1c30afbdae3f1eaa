"""Four questions of a reader in a hurry, each with its answer."""

from __future__ import annotations

from lazarus.render.activation.scores import OUTPUTS, score_line
from lazarus.render.activation.series import LayerSeries, measured
from lazarus.render.activation.summary import BLOCKS_NAMED, units, verdict
from lazarus.render.base.frame import Answer
from lazarus.render.base.words import counted, short
from lazarus.results import ActivationDiffRecord, Output, Scores, differing
from lazarus.results import told as outside


def headline(record: ActivationDiffRecord) -> str:
    """The verdict as a sentence of its own."""
    said = verdict(record)
    if record.summary.verdict is None:
        return f"No verdict: {said.removeprefix('none: ')}"
    return said[0].upper() + said[1:]


def answers(record: ActivationDiffRecord) -> list[Answer]:
    """Did anything change, where, which block did it, and does it matter."""
    return [_whether(record), _where(record), _which_block(record), _does_it_matter(record)]


def _whether(record: ActivationDiffRecord) -> Answer:
    question, found = "Did anything change?", record.summary
    weights = {True: "The weights are the same.", False: "The weights differ.", None: ""}
    told = weights[found.weights_identical]
    others = outside(differing(record.base.not_compared, record.finetuned.not_compared))
    match found.verdict:
        case "changed":
            return Answer(
                question, "Yes", f"Above the numerical noise, which this run measured. {told}".strip()
            )
        case "within_noise" | "identical" | "within_rounding" if others:
            return Answer(question, "Not in what was compared", f"But {others}.")
        case "within_noise":
            return Answer(question, "No", f"Nowhere more than numerical noise. {told}".strip())
        case "within_rounding":
            return Answer(question, "No", "No more than the rounding of the stored weights explains.")
        case "identical":
            return Answer(question, "No", f"Bit for bit the same at every site. {told}".strip())
        case None:
            return Answer(question, "Not known", f"There is no verdict; see the notes. {told}".strip())


def _where(record: ActivationDiffRecord) -> Answer:
    question, found = "Where?", record.summary
    series = LayerSeries.of(record)
    if not measured(series.divergence):
        return _where_by_cka(record, question, series)
    if not found.max_divergence:
        return Answer(question, "Nowhere", f"The divergence is exactly 0 at {_every(len(record.layers))}.")
    n_layers = counted(len(record.layers), "layer")
    reason = f"Divergence {short(found.max_divergence)} there, the largest of {n_layers}."
    if found.onset_layer is not None:
        reason += f" The models part at layer {found.onset_layer}."
    return Answer(question, f"Layer {found.most_divergent_layer}", reason)


def _where_by_cka(record: ActivationDiffRecord, question: str, series: LayerSeries) -> Answer:
    known = [(value, layer) for layer, value in enumerate(series.cka) if value is not None]
    if not known:
        return Answer(question, "Not known", "The states could not be compared; see the notes.")
    value, layer = min(known)
    return Answer(
        question, f"Layer {layer}", f"CKA {short(value)} there, the least of {counted(len(known), 'layer')}."
    )


def _which_block(record: ActivationDiffRecord) -> Answer:
    is_quantised = "quantised-pair" in record.note_codes
    question = "Which block costs most?" if is_quantised else "Which block did it?"
    changes = {layer.layer: layer.local.relative_l2 for layer in record.layers if layer.local}
    known = {layer: value for layer, value in changes.items() if value is not None}
    if not known:
        return Answer(question, "Not measured", "Run with --localize: a high divergence may be inherited.")
    noise = {layer.layer for layer in record.layers if layer.local and layer.local.is_noise}
    block = max(known, key=lambda layer: (layer not in noise, known[layer]))
    has_floors = any(layer.local and layer.local.noise_floor is not None for layer in record.layers)
    is_noise = block in noise if has_floors else record.summary.verdict == "within_noise"
    if is_noise and known[block]:
        return Answer(
            question, "None", f"The largest local change is noise: {short(known[block])} at block {block}."
        )
    if not known[block]:
        return Answer(question, "None", f"The local change is exactly 0 in {_every(len(known), 'block')}.")
    changed = sum(value > 0 for layer, value in known.items() if layer not in noise)
    blocks = counted(len(known), "block")
    reason = f"Local change {short(known[block])}, the largest; {changed} of {blocks} changed."
    if is_quantised:
        ranked = sorted(known, key=lambda layer: -known[layer])[1:BLOCKS_NAMED]
        reason += f" Next: {', '.join(map(str, ranked))}." if ranked else ""
    return Answer(question, f"Block {block}", reason)


def _does_it_matter(record: ActivationDiffRecord) -> Answer:
    question, found = "Does it matter to the next token?", record.output
    if found is not None and found.scores is not None:
        return _to_scores(record, found, found.scores)
    if found is None or found.top1_agreement is None:
        return Answer(
            question, "Not measured", "There is no next-token head, or the run is with --align text."
        )
    differ = 1 - found.top1_agreement
    divergence = f"KL(base‖fine-tuned) {short(found.kl_base_finetuned)} nats"
    if differ:
        return Answer(
            question, f"On {differ:.0%} of {units(record)}", f"There the first choice differs. {divergence}."
        )
    is_changed = record.summary.verdict not in ("identical", "within_noise", "within_rounding")
    reason = f"First choices agree on all {units(record)}; {divergence}."
    return Answer(question, "Hardly" if is_changed and found.js else "No", reason)


def _to_scores(record: ActivationDiffRecord, output: Output, scores: Scores) -> Answer:
    question = f"Does it matter to {OUTPUTS[output.kind]}?"
    told = score_line(output, scores).partition(": ")[2]
    reason = f"{told[0].upper()}{told[1:]}." if told else "See the notes."
    if record.summary.verdict in ("identical", "within_noise", "within_rounding"):
        return Answer(question, "No", reason)
    if scores.agreement is not None and scores.agreement < 1:
        return Answer(question, f"On {1 - scores.agreement:.0%}", reason)
    if not scores.relative_l2:
        return Answer(question, "No", "They are the same." if scores.relative_l2 == 0 else reason)
    return Answer(question, f"By {short(scores.relative_l2)} of their size", reason)


def _every(number: int, noun: str = "layer") -> str:
    return f"the one {noun}" if number == 1 else f"all {number} {noun}s"
