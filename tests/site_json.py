"""The page on the JSON format, from the schema: each field, its type, what it means, and when it is null."""

from __future__ import annotations

from typing import Any

from lazarus.commands import commands
from lazarus.notes import CODES
from lazarus.results import LENS_METRICS, METRICS, SERIES_METRICS, WEIGHT_METRICS, json_schema

HEAD = """# JSON format

What `-o FILE.json` holds and `load_result` reads: one object, of [`activation-diff`](#activationdiffrecord),
[`weight-diff`](#weightdiffrecord), [`compare`](#comparerecord) or [`series`](#seriesrecord). The schemas
themselves (JSON Schema, draft 2020-12):

```bash
lazarus schema activation-diff
lazarus schema weight-diff
lazarus schema compare
lazarus schema series
```

A number that was not measured, or is not finite, is `null`: never 0, and never `NaN`. Numbers are written
with all the digits of a float64. `layer` counts blocks from 0. No object has fields other than these.

This page is written by `make docs-reference` from the schema. Formulas: [Metrics](reference.md#metrics);
how to read the numbers: [How to read it](how-to-read-it.md).
"""

OF_NOTES = """## Codes of notes

A note is a sentence for a reader; its code says for a program what kind of thing it tells. `notes` and
`note_codes` of a result are of one length. Codes stay as they are, while a sentence may be put better; a
newer version may have more of them.
"""

_METRICS = WEIGHT_METRICS | LENS_METRICS | SERIES_METRICS | METRICS

MEANINGS = {
    "schema_version": "the version of this format",
    "dequantize": "whether a quantised checkpoint runs on dequantised weights: `auto`, `always` or `never`",
    "command": "which command made it",
    "tool": "which program made it",
    "environment": "software and hardware",
    "notes": "what was left out, assumed, or could not be measured",
    "note_codes": "the [code](#codes-of-notes) of each of the `notes`; none in a result of an older version",
    "python": "version of Python",
    "platform": "operating system and processor",
    "torch": "version of torch",
    "transformers": "version of transformers",
    "n_threads": "threads of torch on the CPU",
    "ModelInfo.kind": "what the name stood for",
    "CheckpointInfo.kind": "what the name stood for",
    "layers_path": "where the blocks were said to be",
    "seed": "of every random choice",
    "no_digests": "whether the SHA-256 of the models' files was left out",
    "trust_remote_code": "whether the models' own Python code was allowed",
    "ActivationDiffRecord.base": "the base model, as it was run",
    "ActivationDiffRecord.finetuned": "the fine-tuned model, as it was run",
    "ActivationDiffRecord.settings": "every option; `auto` is replaced by what it came to",
    "ActivationDiffRecord.prompts": "in the order in which they were given",
    "ActivationDiffRecord.layers": "one for each block, in order",
    "ActivationDiffRecord.sites": "what enters the first block, and what leaves the final norm",
    "ActivationDiffRecord.components": "what is inside each block, in order; of experts with their router",
    "ComponentRecord.name": "what it is: what attention adds, what the MLP adds, or the router's logits",
    "ComponentRecord.local": "what the component's own weights change, the norms around it included",
    "ActivationDiffRecord.results": "one for each prompt and layer, prompt by prompt",
    "ActivationDiffRecord.summary": "the few numbers that a reader looks for first",
    "ActivationDiffRecord.output": "the effect on the next token, or on scores or embeddings",
    "Output.scores": "what became of scores or embeddings",
    "ActivationDiffRecord.attribution": "who caused the change of the output",
    "ActivationDiffRecord.mined": "the tokens that are promoted and suppressed most often (Diff Mining)",
    "ActivationDiffRecord.readout": "one for each layer that was read out",
    "Attribution.target": "what the parts add up to",
    "Attribution.restored": "what is left with the first group, and with the first three, set back to base",
    "AttributedGroup.name": "such as `block 7`, `embedding and head`, or the name of a tensor",
    "Restored.groups": "the groups that are set back to base",
    "ActivationDiffRecord.groups": "what the prompts' groups show",
    "ActivationDiffRecord.tokens": "one for each prompt of which every token was kept",
    "Environment.device_name": "name of the processor or GPU",
    "GroupContrast.group_a": "the first group that was given",
    "GroupContrast.group_b": "the group that it is held against",
    "GroupCurve.group": "the group",
    "GroupCurve.n_prompts": "its prompts",
    "GroupCurve.divergence": "its mean divergence at each layer",
    "Groups.curves": "one for each group, in the order in which they were given",
    "Groups.contrasts": "the first group against each of the others",
    "LayerRecord.local": "what the block's own weights change",
    "PromptRecord.index": "its place in the run, from 0",
    "PromptRecord.text": "what the user gave, whole; of a chat, its last message",
    "PromptRecord.group": "the group that the user gave it",
    "PromptRecord.n_tokens": "its tokens, special tokens included",
    "PromptRecord.rendered": "the text that was run, of a chat template or with its response",
    "MinedToken.token": "its text",
    "Readout.base_promoted": "the tokens that the mean difference promotes most, by the base model's head",
    "Readout.base_suppressed": "those that it suppresses most",
    "Readout.finetuned_promoted": "the same by the fine-tuned model's head",
    "Readout.finetuned_suppressed": "the same by the fine-tuned model's head",
    "ReadoutToken.token": "its text",
    "ReadoutToken.token_id": "its id",
    "ReadoutToken.score": "its logit for the mean difference less its logit for none",
    "ResultRow.local_cosine_similarity": "cosine of F(b) and B(b)",
    "ResultRow.prompt_index": "`prompts[].index`",
    "ResultRow.prompt": "the prompt's text",
    "Settings.position": "which tokens were compared",
    "Settings.threshold": "the divergence that flags a layer",
    "Settings.dtype": "the type in which both models ran",
    "Settings.device": "where they ran",
    "Settings.chat_template": "`none`, whose template, or its file",
    "Settings.memory": "both models in memory, or a block of each at a time",
    "Settings.align": "the same token ids for both, or each one's own reading of the text",
    "Settings.localize": "whether local change was measured",
    "Settings.sites": "whether blocks alone were compared, or what is inside them too",
    "Settings.attribute": "whether the change was attributed, to blocks or to single tensors",
    "Settings.readout": "which layers were asked for",
    "Settings.noise_floor": "whether the noise was measured",
    "Settings.noise_from": "another recording of base that counts as noise",
    "Settings.fail_above": "the gate on the divergence",
    "Settings.expect": "the gate on the verdict",
    "Settings.only_compared": "whether gates look at what was compared alone",
    "Settings.no_split": "whether each `-p` was one prompt",
    "Settings.truncate": "whether long prompts might be cut",
    "Settings.work_dir": "the folder that keeps what is done",
    "Settings.anonymous": "whether the machine's paths and the user's name were left out",
    "WeightSettings.anonymous": "whether the machine's paths and the user's name were left out",
    "LensSettings.anonymous": "whether the machine's paths and the user's name were left out",
    "Settings.token_prompts": "of which prompts every token was kept",
    "SiteRecord.local": "always null: a site outside the blocks has no block",
    "SiteRecord.name": "which site",
    "Summary.most_divergent_layer": "the layer with the largest divergence",
    "Summary.max_divergence": "that divergence",
    "Summary.first_flagged_layer": "the first layer above the threshold",
    "Summary.n_flagged_layers": "how many layers are above it",
    "Parting.margin_finetuned": "the same in the fine-tuned model: its own first choice against base's",
    "TokenChoice.token": "its text",
    "TokenChoice.token_id": "its id in that model's vocabulary",
    "TokenTrace.prompt_index": "`prompts[].index`",
    "Tool.name": "`lazarus`",
    "Tool.version": "its version",
    "WeightDiffRecord.base": "the base checkpoint",
    "WeightDiffRecord.finetuned": "the fine-tuned checkpoint",
    "WeightDiffRecord.settings": "every option",
    "WeightDiffRecord.layers": "one for each block with a tensor of both, in order",
    "WeightDiffRecord.results": "one for each tensor that both have, in the model's order",
    "WeightDiffRecord.unmatched": "the tensors that could not be compared, or not in full",
    "WeightDiffRecord.summary": "the few numbers that a reader looks for first",
    "WeightSettings.threshold": "the relative change that flags a tensor",
    "WeightSettings.spectrum": "whether singular values were computed",
    "WeightSettings.fail_above": "the gate on the relative change",
    "WeightSettings.expect": "the gate on the verdict",
    "WeightSettings.only_compared": "whether gates look at what was compared alone",
    "WeightSettings.allow_pickle": "whether .bin files might be read",
    "WeightLayerRecord.n_tensors": "its tensors that both have",
    "WeightLayerRecord.n_changed_tensors": "those of them with another bit",
    "TensorRecord.base_dtype": "the type that it is stored in",
    "TensorRecord.finetuned_dtype": "the same; `float64` where an adapter is added to it",
    "TensorRecord.n_changed": "numbers with other bits",
    "UnmatchedTensor.component": "its standard name",
    "UnmatchedTensor.name": "its name in the file",
    "WeightSummary.n_flagged_tensors": "rows above the threshold",
    "WeightSummary.n_unmatched": "tensors that could not be compared, or not in full",
    "CompareRecord.model1": "the first model and its lens",
    "CompareRecord.model2": "the second model and its lens",
    "CompareRecord.settings": "every option; `auto` is replaced by what it came to",
    "CompareRecord.layers": "one for each layer of the first model",
    "CompareRecord.summary": "the few numbers that a reader looks for first",
    "LensModel.info": "the model, as it was run",
    "LensModel.layers": "one for each block, in order",
    "LensToken.token_id": "its id in this model",
    "TokenEvolution.token_id": "its id in this model",
    "LensSettings.at": "where the prompt is read: `last`, or `parting`",
    "LensSettings.top_k": "tokens that are kept of each layer",
    "LensSettings.track": "the tokens that were asked for",
    "LensSettings.dtype": "the type in which both models ran",
    "LensSettings.device": "where they ran",
    "LensSettings.chat_template": "`none`, whose template, or its file",
    "LensSettings.truncate": "whether a long prompt might be cut",
    "LensSummary.max_js": "that JS",
    "SeriesRecord.base": "the base model, as it was run",
    "SeriesRecord.settings": "every option; `auto` is replaced by what it came to",
    "SeriesRecord.prompts": "in the order in which they were given",
    "SeriesRecord.members": "one for each model, in the order in which they were given",
    "SeriesRecord.findings": "what the models show together",
    "SeriesMember.model": "the model, as it was run",
    "SeriesMember.summary": "the few numbers that a reader looks for first",
    "SeriesMember.layers": "one for each block, in order, against base",
    "SeriesMember.sites": "what enters the first block, and what leaves the final norm",
    "SeriesMember.output": "the effect on the next token, or on scores or embeddings",
    "Predecessor.verdict": "held against the noise of base",
    "SeriesFinding.kind": "what was found",
    "SeriesFinding.text": "the same as a sentence",
}
"""What a field means, where the schema does not say it and no metric has its name."""

_NO_PAIR = "no pair of states there is finite and not zero, or the widths differ"
_NO_NOISE = "the noise was not measured (`--no-noise-floor`), or the widths differ"
_NO_LOCAL = "without `--localize`"
_NO_EXPERTS = "it is no router, or the experts that it picks cannot be seen"
_NO_ATTRIBUTION = "without `--attribute`"
_NOT_FINITE = "it is not finite: one model rules out a token that the other may give"
_NO_NEXT_TOKEN = f"{_NOT_FINITE}; or `kind` is not `next_token`"
_FEWER_THAN_5 = "there are fewer than 5 prompts"
_NONE_GIVEN = "none was given"
_NO_SPECTRUM = "without `--spectrum`, or where no matrix changed"
_NO_LOGITS = "the logits are not finite there"

NULL_WHEN = {
    "ReadFile.sha256": "`no_digests` is set, or the file changed after it had been read",
    "quantisation": "both are quantised, or neither, or an adapter is on one",
    "relative_error": "the other tensor is all zero, or not finite",
    "nearest_relative_error": "its codes are floats, its blocks are very large, or as `relative_error`",
    "error_ratio": "as `nearest_relative_error`",
    "outlier_share": "there is no error, or as `relative_error`",
    "cosine_similarity": _NO_PAIR,
    "divergence": _NO_PAIR,
    "relative_l2": _NO_PAIR,
    "norm_ratio": _NO_PAIR,
    "centered_cosine_similarity": "the models have no LayerNorm, or as `divergence`",
    "noise_floor": _NO_NOISE,
    "noise_floor_divergence": _NO_NOISE,
    "unrelated_similarity": "there is one prompt, or as `divergence`",
    "normalized_divergence": "1 − `unrelated_similarity` is below 0.05, or that is null",
    "interval": "fewer than 5 prompts, or as `divergence`",
    "top1_share": "the mean cosine is not above 0, or as `divergence`",
    "top3_share": "the mean cosine is not above 0, or as `divergence`",
    "cka": "fewer than 50 prompts",
    "local": _NO_LOCAL,
    "ModelInfo.runtime": "the model ran here, and is no recording",
    "Settings.noise_from": _NONE_GIVEN,
    "LocalChange.noise_floor": "neither model is a recording, or the noise was not measured",
    "LocalChange.relative_l2": "no pair of states there is finite and not zero",
    "LocalChange.cosine_similarity": "no pair of states there is finite and not zero",
    "finetuned_layer": "it is the same layer",
    "local_relative_l2": _NO_LOCAL,
    "local_cosine_similarity": _NO_LOCAL,
    "ActivationDiffRecord.output": "no head was run: encoders without one, next tokens with `--align text`, "
    "the few that a note names",
    "Output.scores": "`kind` is `next_token`",
    "Scores.relative_l2": "base's are all 0 and the fine-tuned model's are not",
    "Scores.mean_absolute_difference": _NOT_FINITE,
    "Scores.mean_absolute_difference_interval": _FEWER_THAN_5,
    "Scores.agreement": "there is one label, or `kind` is `embedding`",
    "Scores.agreement_interval": f"as `agreement`, or {_FEWER_THAN_5}",
    "Scores.divergence": "`kind` is not `embedding`",
    "Scores.divergence_interval": f"as `divergence`, or {_FEWER_THAN_5}",
    "Scores.rank_correlation": "there are fewer than 3 prompts, all scores are one, or `kind` is "
    "`token_scores`",
    "Scores.rank_correlation_interval": f"it is 1, −1 or null, or {_FEWER_THAN_5}",
    "Scores.base": "a number is not finite, or was not measured",
    "Scores.finetuned": "a number is not finite, or was not measured",
    "ActivationDiffRecord.mined": "without `--readout`, or where a note says why nothing was mined",
    "ActivationDiffRecord.readout": "without `--readout`",
    "ActivationDiffRecord.groups": "no prompt has a group",
    "Parting.cause": "without the noise floor",
    "Parting.margin_base": "base's vocabulary lacks the other token",
    "Parting.margin_finetuned": "the fine-tuned model's vocabulary lacks the other token",
    "Parting.noise_margin": "without the noise floor",
    "TokenTrace.kl": "the heads were not run; of a token where logits are not finite or KL is infinite",
    "TokenTrace.agrees": "the heads were not run; of a token where logits are not finite",
    "TokenTrace.base_choices": "the heads were not run",
    "TokenTrace.finetuned_choices": "the heads were not run",
    "TokenTrace.parting": "first choices agree after every compared token, or the heads were not run",
    "ActivationDiffRecord.tokens": "`position` is not `all` or `response`, widths differ, or none was kept",
    "Environment.matmul": "never, in a result of this version",
    "GroupContrast.p_value": "as `layer`, or a group has fewer than 2 measured prompts",
    "GroupContrast.layer": "both groups are within the noise at every layer",
    "kl_base_finetuned": _NO_NEXT_TOKEN,
    "kl_finetuned_base": _NO_NEXT_TOKEN,
    "Output.js": _NO_NEXT_TOKEN,
    "LensPair.js": "it is not finite: logits are not finite",
    "top1_agreement": _NO_NEXT_TOKEN,
    "base_rank_of_finetuned_top1": _NO_NEXT_TOKEN,
    "logits_relative_l2": _NO_NEXT_TOKEN,
    "revision": "it is not from the Hub",
    "stored_dtype": "no file says it",
    "ModelInfo.attention": "the model does not say",
    "adapter": "it has none",
    "PromptRecord.group": _NONE_GIVEN,
    "rendered": "without `--chat-template`",
    "PromptRecord.rendered": "`text` was run as it is",
    "PromptRecord.finetuned_n_tokens": "without `--align text`",
    "Readout.static_share": "there is one prompt, or no change",
    "ActivationDiffRecord.components": "without `--sites all`",
    "ComponentRecord.local": "without `--localize`, or where the two blocks add their terms elsewhere",
    "expert_agreement": _NO_EXPERTS,
    "flipped_share": _NO_EXPERTS,
    "expert_agreement_noise": "as `expert_agreement`, or the noise was not measured",
    "flipped_share_noise": "as `expert_agreement`, or the noise was not measured",
    "flipped_change_share": "as `expert_agreement`, `position` is `mean`, or nothing changed",
    "flipped_change_share_noise": "as `expert_agreement_noise`, `position` is `mean`, or nothing changed",
    "ActivationDiffRecord.attribution": _NO_ATTRIBUTION,
    "Settings.attribute": _NO_ATTRIBUTION,
    "AttributedGroup.layer": "outside the blocks",
    "AttributedGroup.component": "with `--attribute blocks`",
    "AttributedGroup.share": "the sum is 0",
    "AttributedGroup.interval": "there are fewer than 5 prompts",
    "GroupCurve.nats": _NO_ATTRIBUTION,
    "ResultRow.nats": _NO_ATTRIBUTION,
    "Settings.readout": "without `--readout`",
    "fail_above": _NONE_GIVEN,
    "expect": _NONE_GIVEN,
    "layers_path": _NONE_GIVEN,
    "Settings.work_dir": _NONE_GIVEN,
    "Settings.token_prompts": "`position` is not `all` or `response`",
    "Summary.most_divergent_layer": "no layer was measured",
    "Summary.max_divergence": "no layer was measured",
    "Summary.first_flagged_layer": "there is none",
    "Summary.verdict": "the noise was not measured and the two are not identical, or logits are not finite",
    "Summary.weights_identical": "a weight, or a part that was not compared, could not be looked into",
    "Summary.n_prompts_left_out": "never, in a result of this version",
    "Summary.n_outputs_left_out": "never, in a result of this version",
    "NotCompared.differs": "it is not known",
    "Summary.onset_layer": "there is none, there are fewer than 5 prompts, or the noise was not measured",
    "Summary.most_changed_block": "without `--localize`, or where no block changed",
    "relative_change": "it is not finite, or base is all zero",
    "TensorRecord.layer": "outside the blocks",
    "TensorRecord.cosine_similarity": "it is not finite, or one of the two is all zero",
    "TensorRecord.max_abs_change": "it is not finite",
    "TensorRecord.base_norm": "it is not finite, or nothing changed in the whole model",
    "TensorRecord.change_norm": "it is not finite",
    "TensorRecord.spectrum": "without `--spectrum`; no matrix, not changed, or not finite",
    "UnmatchedTensor.rows_alone": "no vocabulary's tensor, or not compared at all",
    "TensorRecord.rounding": "nothing changed; neither can be the other's rounding; or it cannot be told",
    "TensorRecord.merged_share": "no adapter is on it, or what is stored is something else than its update",
    "Spectrum.effective_rank": "not all σ were computed",
    "Spectrum.rank_90": "more σ are needed than were computed",
    "Spectrum.rounding_norm": "the numbers are quantised",
    "Spectrum.adapter_rank": "it does not look like an adapter's, or the numbers are quantised",
    "UnmatchedTensor.layer": "outside the blocks",
    "UnmatchedTensor.base_shape": "base has none",
    "UnmatchedTensor.finetuned_shape": "the fine-tuned one has none",
    "WeightSummary.first_changed_layer": "no block changed",
    "WeightSummary.n_matrices": _NO_SPECTRUM,
    "WeightSummary.n_low_rank": _NO_SPECTRUM,
    "WeightSummary.adapter_rank": "not every changed matrix has one, or as `n_matrices`",
    "probability": _NO_LOGITS,
    "final_probability": "as `token_id`, or the last logits are not finite",
    "TokenEvolution.token": "as `token_id`",
    "TokenEvolution.token_id": "the model has no token for it",
    "TokenEvolution.emergence_layer": "it is not the first choice at the end",
    "CompareRecord.position": "the two tokenizers count the prompt's tokens differently",
    "LensSettings.track": "none was given: the first choices of both",
    "kl_1_2": "it is not finite: model 2 rules out a token that model 1 may give, or logits are not finite",
    "kl_2_1": "the same the other way round",
    "same_first_choice": _NO_LOGITS,
    "LensSummary.most_divergent_layer": "JS is finite at no layer",
    "LensSummary.max_js": "JS is finite at no layer",
    "distance": "a state is not finite, the shapes differ, or no states were kept",
    "SeriesMember.step": "the names have no numbers, or not a different one each",
    "SeriesMember.output": "no head was run",
    "SeriesMember.turn": "there are not two steps before, one has no length, or as `distance`",
    "SeriesMember.previous": "it is the first one, the shapes differ, or no states were kept",
    "Predecessor.divergence": "no layer was measured",
    "Predecessor.layer": "no layer was measured",
    "Predecessor.kl": "as `kl_base_finetuned`, or the logits of all prompts take more than 2 GiB",
    "Predecessor.verdict": "the noise was not measured, or states are not finite",
    "SeriesFinding.interval": "it is no change point",
    "SeriesFinding.strength": "it is no change point",
}
"""When a field is null, by its record and name, or by its name where that is the same in all records."""


def json_page() -> str:
    """The page: each command's whole result, and then each record in the order in which it is met."""
    page = [HEAD]
    records, names = _records(), dict[str, None]()
    for command in commands():
        names |= dict.fromkeys(_in_order(records, json_schema(command)["$ref"]))
    for name in names:
        page += [f"## {name}", "", _sentence(records[name]["description"]), ""]
        page += ["| Field | Type | What it is | `null` when |", "|---|---|---|---|"]
        page += [_row(name, field, told) for field, told in records[name]["properties"].items()]
        page.append("")
    page += [OF_NOTES, "| Code | What a note of it tells |", "|---|---|"]
    page += [f"| `{code}` | {told} |" for code, told in CODES.items()]
    return "\n".join([*page, ""])


def _records() -> dict[str, Any]:
    """Every record of every command, by its name."""
    return {name: told for command in commands() for name, told in json_schema(command)["$defs"].items()}


def described_fields() -> dict[str, dict[str, Any]]:
    """Every field of every record, as `Record.field`, with its part of the schema."""
    return {
        f"{name}.{field}": told
        for name, record in _records().items()
        for field, told in record["properties"].items()
    }


def meaning(field: str, told: dict[str, Any]) -> str | None:
    """What a field is: said here, by the schema, or by the metric of its name."""
    name = field.partition(".")[2]
    own = MEANINGS.get(field) or MEANINGS.get(name)
    own = own or told.get("description") or _branches(told)[0].get("description")
    if own is None and name in _METRICS:
        own = _METRICS[name].formula
    if own is None and name == "layer":
        own = "the block, counted from 0"
    return own


def null_when(field: str) -> str | None:
    """When a field is null; None where that is said nowhere."""
    return NULL_WHEN.get(field) or NULL_WHEN.get(field.partition(".")[2])


def is_nullable(told: dict[str, Any]) -> bool:
    """Whether a field may be null."""
    return any(branch.get("type") == "null" for branch in told.get("anyOf", ())) or None in told.get(
        "enum", ()
    )


def _in_order(records: dict[str, Any], reference: str) -> list[str]:
    waiting, found = [_record(reference)], []
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found.append(name)
            inner = [_referenced(told) for told in records[name]["properties"].values()]
            waiting = [*(n for n in inner if n), *waiting]
    return found


def _referenced(told: dict[str, Any]) -> str | None:
    for branch in _branches(told):
        if "$ref" in branch:
            return _record(branch["$ref"])
        if branch.get("items"):
            # An item may be a list itself.
            return _referenced(branch["items"])
    return None


def _record(reference: str) -> str:
    return reference.rsplit("/", 1)[1]


def _row(record: str, name: str, told: dict[str, Any]) -> str:
    field = f"{record}.{name}"
    null = null_when(field) if is_nullable(told) else None
    cells = (f"`{name}`", _type(told), meaning(field, told) or "", null or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _branches(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [branch for branch in told.get("anyOf", [told]) if branch.get("type") != "null"]


def _type(told: dict[str, Any]) -> str:
    (branch,) = _branches(told)
    if "enum" in branch:
        return " or ".join(f"`{value}`" for value in branch["enum"] if value is not None)
    if "$ref" in branch:
        name = _record(branch["$ref"])
        return f"[{name}](#{name.lower()})"
    if branch["type"] == "array":
        inner = branch.get("items") or branch["prefixItems"][0]
        return f"list of {_type(inner)}"
    return {"number": "number", "integer": "integer", "string": "text", "boolean": "true or false"}[
        branch["type"]
    ]


def _sentence(description: str) -> str:
    return description.split("\n\n")[0].replace("\n", " ")
