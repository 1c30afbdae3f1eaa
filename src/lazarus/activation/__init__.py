"""activation-diff: the same prompts through both models, compared at every layer.

run.py           the use case: from options and models to a result
prepare.py       from what the caller gave to two models that are loaded and known
runplan.py       what is run: prompts, batches, repeats (repeats.py)
scope.py         what of two models is compared, and what is left out
measure.py       run all batches, in one process or shared by many
accumulation.py  pairs of states go in, sums stay
components.py    the same of what is inside blocks, with their records
findings.py      from sums to numbers: means, references beside them, verdict, summary
scores.py        the change of scores and embeddings
traces.py        every token of a few prompts
mined.py         the tokens of Diff Mining, or why there are none
limits.py        what a reader must know of the numbers
result.py        the result
live.py          what live models add to it: facts, and a look at their weights (rounding.py)
breaks.py        which model gives states that are not finite, and why
readout.py       the mean difference, read as tokens
capture.py       one model, its states written down: record; a GGUF file run by llama.cpp (llama_cpp.py)
recorded.py      a recording in place of a model, or of both; its facts (recorded_facts.py), its prompts
                 (recorded_prompts.py), its rows (recorded_rows.py), the noise of one block (local_noise.py)
readers.py       tokens as text
estimate.py      what a run would take; trial.py and record_trial.py run a part of it, flops.py counts
attribution.py   who caused the change of the output; attributed.py tells of it

accumulation.py, attributed.py, components.py, repeats.py, findings.py, scores.py, traces.py, mined.py,
limits.py and result.py need no model: whoever has pairs of states from another runtime gives them `PairFacts`
and a `Plan`.
"""

from lazarus.activation.accumulation import Accumulation, Plan
from lazarus.activation.capture import record
from lazarus.activation.estimate import estimate_record, estimate_run
from lazarus.activation.prepare import Observer
from lazarus.activation.result import About, conclude
from lazarus.activation.run import Prompts, StatePairs, activation_diff, iter_state_pairs
from lazarus.facts import ModelFacts, PairFacts, WeightFacts
from lazarus.sites import StatePair

__all__ = [
    "About",
    "Accumulation",
    "ModelFacts",
    "Observer",
    "PairFacts",
    "Plan",
    "Prompts",
    "StatePair",
    "StatePairs",
    "WeightFacts",
    "activation_diff",
    "conclude",
    "estimate_record",
    "estimate_run",
    "iter_state_pairs",
    "record",
]
