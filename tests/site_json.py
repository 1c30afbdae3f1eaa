"""The page on the JSON format, from the schema: each field, its type, what it means, and when it is null."""

from __future__ import annotations

from typing import Any

from lazarus.results import METRICS, json_schema

HEAD = """# JSON format

What `-o FILE.json` holds and `ActivationDiff.load` reads. The schema itself (JSON Schema, draft 2020-12):

```bash
lazarus schema activation-diff
```

A number that was not measured, or is not finite, is `null`: never 0, and never `NaN`. Numbers are written
with all the digits of a float64. `layer` counts blocks from 0. No object has fields other than these.

This page is written by `make docs-reference` from the schema. Formulas: [Metrics](reference.md#metrics);
how to read the numbers: [How to read it](how-to-read-it.md).
"""

MEANINGS = {
    "ActivationDiffRecord.schema_version": "the version of this format",
    "ActivationDiffRecord.command": "which command made it",
    "ActivationDiffRecord.tool": "which program made it",
    "ActivationDiffRecord.base": "the base model, as it was run",
    "ActivationDiffRecord.finetuned": "the fine-tuned model, as it was run",
    "ActivationDiffRecord.settings": "every option; `auto` is replaced by what it came to",
    "ActivationDiffRecord.environment": "software and hardware",
    "ActivationDiffRecord.prompts": "in the order in which they were given",
    "ActivationDiffRecord.layers": "one for each block, in order",
    "ActivationDiffRecord.sites": "what enters the first block, and what leaves the final norm",
    "ActivationDiffRecord.results": "one for each prompt and layer, prompt by prompt",
    "ActivationDiffRecord.summary": "the few numbers that a reader looks for first",
    "ActivationDiffRecord.output": "the effect on the next token",
    "ActivationDiffRecord.readout": "one for each layer that was read out",
    "ActivationDiffRecord.groups": "what the prompts' groups show",
    "ActivationDiffRecord.tokens": "one for each prompt of which every token was kept",
    "ActivationDiffRecord.notes": "what was left out, assumed, or could not be measured",
    "Environment.python": "version of Python",
    "Environment.platform": "operating system and processor",
    "Environment.torch": "version of torch",
    "Environment.transformers": "version of transformers",
    "Environment.device_name": "name of the processor or GPU",
    "Environment.n_threads": "threads of torch on the CPU",
    "GroupContrast.group_a": "the first group that was given",
    "GroupContrast.group_b": "the group that it is held against",
    "GroupCurve.group": "the group",
    "GroupCurve.n_prompts": "its prompts",
    "GroupCurve.divergence": "its mean divergence at each layer",
    "Groups.curves": "one for each group, in the order in which they were given",
    "Groups.contrasts": "the first group against each of the others",
    "LayerRecord.local": "what the block's own weights change",
    "ModelInfo.kind": "what the name stood for",
    "PromptRecord.index": "its place in the run, from 0",
    "PromptRecord.text": "what the user gave, whole; of a chat, its last message",
    "PromptRecord.group": "the group that the user gave it",
    "PromptRecord.n_tokens": "its tokens, special tokens included",
    "PromptRecord.rendered": "the text that a chat template made of it",
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
    "Settings.readout": "which layers were asked for",
    "Settings.noise_floor": "whether the noise was measured",
    "Settings.fail_above": "the gate on the divergence",
    "Settings.expect": "the gate on the verdict",
    "Settings.no_split": "whether each `-p` was one prompt",
    "Settings.truncate": "whether long prompts might be cut",
    "Settings.layers_path": "where the blocks were said to be",
    "Settings.seed": "of every random choice",
    "Settings.trust_remote_code": "whether the models' own Python code was allowed",
    "Settings.work_dir": "the folder that keeps what is done",
    "Settings.token_prompts": "of which prompts every token was kept",
    "SiteRecord.local": "always null: a site outside the blocks has no block",
    "SiteRecord.name": "which site",
    "Summary.most_divergent_layer": "the layer with the largest divergence",
    "Summary.max_divergence": "that divergence",
    "Summary.first_flagged_layer": "the first layer above the threshold",
    "Summary.n_flagged_layers": "how many layers are above it",
    "TokenTrace.prompt_index": "`prompts[].index`",
    "Tool.name": "`lazarus`",
    "Tool.version": "its version",
}
"""What a field means, where the schema does not say it and no metric has its name."""

_NO_PAIR = "no pair of states there is finite and not zero, or the widths differ"
_NO_NOISE = "the noise was not measured (`--no-noise-floor`), or the widths differ"
_NO_LOCAL = "without `--localize`"
_NOT_FINITE = "it is not finite: one model rules out a token that the other may give"
_NONE_GIVEN = "none was given"

NULL_WHEN = {
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
    "LocalChange.relative_l2": "no pair of states there is finite and not zero",
    "LocalChange.cosine_similarity": "no pair of states there is finite and not zero",
    "finetuned_layer": "it is the same layer",
    "local_relative_l2": _NO_LOCAL,
    "local_cosine_similarity": _NO_LOCAL,
    "ActivationDiffRecord.output": "no head was run: encoders, `--align text`, the few that a note names",
    "ActivationDiffRecord.readout": "without `--readout`",
    "ActivationDiffRecord.groups": "no prompt has a group",
    "ActivationDiffRecord.tokens": "`position` is not `all`, the widths differ, or none was kept",
    "Environment.matmul": "nothing was chosen: the run was short, or not in float32 on a CPU",
    "GroupContrast.p_value": "as `layer`, or a group has fewer than 2 measured prompts",
    "GroupContrast.layer": "both groups are within the noise at every layer",
    "kl_base_finetuned": _NOT_FINITE,
    "kl_finetuned_base": _NOT_FINITE,
    "js": _NOT_FINITE,
    "top1_agreement": _NOT_FINITE,
    "base_rank_of_finetuned_top1": _NOT_FINITE,
    "logits_relative_l2": _NOT_FINITE,
    "ModelInfo.revision": "it is not from the Hub",
    "ModelInfo.stored_dtype": "no file says it",
    "ModelInfo.attention": "the model does not say",
    "ModelInfo.adapter": "it has none",
    "PromptRecord.group": _NONE_GIVEN,
    "PromptRecord.rendered": "without `--chat-template`",
    "PromptRecord.finetuned_n_tokens": "without `--align text`",
    "Readout.static_share": "there is one prompt, or no change",
    "Settings.readout": "without `--readout`",
    "Settings.fail_above": _NONE_GIVEN,
    "Settings.expect": _NONE_GIVEN,
    "Settings.layers_path": _NONE_GIVEN,
    "Settings.work_dir": _NONE_GIVEN,
    "Settings.token_prompts": "`position` is not `all`",
    "Summary.most_divergent_layer": "no layer was measured",
    "Summary.max_divergence": "no layer was measured",
    "Summary.first_flagged_layer": "there is none",
    "Summary.verdict": "the noise was not measured and the two are not identical, or logits are not finite",
    "Summary.weights_identical": "never, in a result of this version",
    "Summary.onset_layer": "there is none, there are fewer than 5 prompts, or the noise was not measured",
    "Summary.most_changed_block": "without `--localize`, or where no block changed",
}
"""When a field is null, by its record and name, or by its name where that is the same in all records."""


def json_page() -> str:
    """The page, the whole result first and then each record in the order in which it is met."""
    schema = json_schema()
    records = schema["$defs"]
    page = [HEAD]
    for name in _in_order(records, schema["$ref"]):
        page += [f"## {name}", "", _sentence(records[name]["description"]), ""]
        page += ["| Field | Type | What it is | `null` when |", "|---|---|---|---|"]
        page += [_row(name, field, told) for field, told in records[name]["properties"].items()]
        page.append("")
    return "\n".join(page)


def described_fields() -> dict[str, dict[str, Any]]:
    """Every field of every record, as `Record.field`, with its part of the schema."""
    return {
        f"{name}.{field}": told
        for name, record in json_schema()["$defs"].items()
        for field, told in record["properties"].items()
    }


def meaning(field: str, told: dict[str, Any]) -> str | None:
    """What a field is: said here, by the schema, or by the metric of its name."""
    name = field.partition(".")[2]
    own = MEANINGS.get(field) or told.get("description") or _branches(told)[0].get("description")
    if own is None and name in METRICS:
        own = METRICS[name].formula
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
        reference = branch.get("$ref") or (branch.get("items") or {}).get("$ref")
        if reference:
            return _record(reference)
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
