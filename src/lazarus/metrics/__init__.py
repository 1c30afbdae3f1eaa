"""The formulas, and the accumulators that turn pairs of states into numbers a prompt.

states.py      a pair of rows → its metrics; each prompt's means over its rows
directions.py  what all prompts have in common: the unrelated-prompt baseline, the one static shift
cka.py         similarity of two models of any widths, on one row a prompt
outcomes.py    the next tokens that two models both have, and those that one alone has
experts.py     the experts that two routers pick: how far they agree
output.py      a pair of next-token distributions → how far apart they are
top.py         the same where one of them is known by its likeliest tokens alone
scores.py      a pair of scores or embeddings → how far apart they are; which labels are the same
mining.py      the tokens that a fine-tune raises or lowers most, over all positions
rounding.py    a stored tensor held against base + update, rounded to its dtype
traces.py      every token of a few prompts: the states, and what both models would say next
site.py        all of them at one site
transfers.py   what is on a device → the host, of many sites at once

Everything here is float64: on the few rows that are compared, never on whole activations.
"""

from lazarus.metrics.cka import FEWEST_FOR_CKA, MOST_KEPT, CkaRows, debiased_cka
from lazarus.metrics.directions import Directions, normalized_divergence
from lazarus.metrics.experts import EXPERT_METRICS, compare_experts
from lazarus.metrics.mining import DiffMining
from lazarus.metrics.outcomes import Outcomes, match_outcomes
from lazarus.metrics.output import (
    COPIES,
    MOST_LOGITS,
    OUTPUT_METRICS,
    compare_logits,
    has_distribution,
    logits_bytes,
)
from lazarus.metrics.scores import (
    SCORE_METRICS,
    ScoreKind,
    ScoreMeans,
    ScorePlan,
    compare_scores,
    match_labels,
    scores_relative_l2,
)
from lazarus.metrics.site import BatchRows, SiteMeasures, SitePlan
from lazarus.metrics.states import (
    LOCAL_METRICS,
    ROW_METRICS,
    AccumulatorState,
    PromptMeans,
    Rows,
    RowValues,
    centered_divergence,
    compare_local,
    compare_rows,
    count_by_prompt,
    divergence,
    mean_over_prompts,
    norm_ratio,
    part_of,
    parts_of,
    relative_l2,
    to_float64,
    within,
)
from lazarus.metrics.top import TopTokens, compare_top
from lazarus.metrics.traces import NextTokens, TokenOutputs, TokenTraces, margin_motion
from lazarus.metrics.transfers import PENDING_BYTES, OncePerBatch, Together, Update, on_device

__all__ = [
    "COPIES",
    "EXPERT_METRICS",
    "FEWEST_FOR_CKA",
    "LOCAL_METRICS",
    "MOST_KEPT",
    "MOST_LOGITS",
    "OUTPUT_METRICS",
    "PENDING_BYTES",
    "ROW_METRICS",
    "SCORE_METRICS",
    "AccumulatorState",
    "BatchRows",
    "CkaRows",
    "DiffMining",
    "Directions",
    "NextTokens",
    "OncePerBatch",
    "Outcomes",
    "PromptMeans",
    "RowValues",
    "Rows",
    "ScoreKind",
    "ScoreMeans",
    "ScorePlan",
    "SiteMeasures",
    "SitePlan",
    "Together",
    "TokenOutputs",
    "TokenTraces",
    "TopTokens",
    "Update",
    "centered_divergence",
    "compare_experts",
    "compare_local",
    "compare_logits",
    "compare_rows",
    "compare_scores",
    "compare_top",
    "count_by_prompt",
    "debiased_cka",
    "divergence",
    "has_distribution",
    "logits_bytes",
    "margin_motion",
    "match_labels",
    "match_outcomes",
    "mean_over_prompts",
    "norm_ratio",
    "normalized_divergence",
    "on_device",
    "part_of",
    "parts_of",
    "relative_l2",
    "scores_relative_l2",
    "to_float64",
    "within",
]
