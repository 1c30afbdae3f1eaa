"""Run the pair: the same batches through both models, and out come pairs of states.

positions.py   which rows of a batch are compared
recorder.py    the states at every site of one model's forward pass
finite.py      where a model's states stop being finite, and why
head.py        a model's own LM head on a few rows
local.py       the fine-tuned model's blocks on base's states: what each block itself changes
score_heads.py  scores of labels, and embeddings, of each prompt by itself
scored.py      which of them two models have in common
probe.py       one short pass that learns how a model's blocks behave, and checks it
coverage.py    the tensors that a comparison can see
forms.py       where in a block its sublayers' terms and its router are
components.py  how these are found, by the sum that they must give
taps.py        the compared rows inside blocks, while a model runs
pair.py        two models, what they have in common, and what cannot be asked of them
prefix_cache.py  the KV cache of a prefix, from which a pass goes on
runner.py      one of the two models, ready to run batches
replay.py      blocks that need not run: a pass goes on from what they returned before
arguments.py   what a block was called with, and whether another call is the same
resident.py    both models in memory, batch by batch
streamed.py    a block of each model in memory at a time, over all batches; passes.py has one batch's
forced.py      every block on the states of another run, so that nothing is inherited
spill.py       hidden states between two blocks, in memory or in files
run.py         either of the two, on a piece of work (work.py)
prefix.py      whether a prefix that all prompts have in common runs once
kept.py        base's rows, kept from the first of several runs against it
noise.py       base against base, with what ought not to matter changed
path.py        a model at any point of the straight path between two
contributions.py  what each changed parameter adds to a gradient, prompt by prompt
attribution.py the integrand of an attribution, at one point of a path
"""

from lazarus.engine.attribution import Asked, PathRunner
from lazarus.engine.components import learn_components, note_components, with_components
from lazarus.engine.contributions import Contributions
from lazarus.engine.coverage import Coverage, find_coverage
from lazarus.engine.finite import (
    Break,
    broken_weights,
    faulty_weights,
    find_break,
    note_of_absurd,
    note_of_weights,
)
from lazarus.engine.forced import GivenStates
from lazarus.engine.head import NO_HEAD, Head
from lazarus.engine.kept import KeptStates
from lazarus.engine.noise import EXTRA_PADDING, NoisePlan, one_ulp_away, pick_sample
from lazarus.engine.pair import ModelPair, check_shapes, learn_pair
from lazarus.engine.path import Path, check_path
from lazarus.engine.positions import RowPicker, check_positions
from lazarus.engine.prefix import PrefixPlan, common_prefix, share_prefix
from lazarus.engine.probe import Conventions, head_reads_blocks, learn
from lazarus.engine.resident import Resident, run_pairs
from lazarus.engine.run import run
from lazarus.engine.runner import Runner
from lazarus.engine.spill import SpillBuffer
from lazarus.engine.streamed import KEPT_SHARE
from lazarus.engine.work import Work

__all__ = [
    "EXTRA_PADDING",
    "KEPT_SHARE",
    "NO_HEAD",
    "Asked",
    "Break",
    "Contributions",
    "Conventions",
    "Coverage",
    "GivenStates",
    "Head",
    "KeptStates",
    "ModelPair",
    "NoisePlan",
    "Path",
    "PathRunner",
    "PrefixPlan",
    "Resident",
    "RowPicker",
    "Runner",
    "SpillBuffer",
    "Work",
    "broken_weights",
    "check_path",
    "check_positions",
    "check_shapes",
    "common_prefix",
    "faulty_weights",
    "find_break",
    "find_coverage",
    "head_reads_blocks",
    "learn",
    "learn_components",
    "learn_pair",
    "note_components",
    "note_of_absurd",
    "note_of_weights",
    "one_ulp_away",
    "pick_sample",
    "run",
    "run_pairs",
    "share_prefix",
    "with_components",
]
