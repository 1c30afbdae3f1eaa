"""Run the pair: the same batches through both models, and out come pairs of states.

positions.py   which rows of a batch are compared
recorder.py    the states at every site of one model's forward pass
head.py        a model's own head on a few rows
local.py       the fine-tuned model's blocks on base's states: what each block itself changes
probe.py       one short pass that learns how a model's blocks behave, and checks it
pair.py        two models, what they have in common, and what cannot be asked of them
side.py        one of the two models, ready to run batches
resident.py    both models in memory, batch by batch
noise.py       base against base, with what ought not to matter changed
"""

from lazarus.engine.head import Head
from lazarus.engine.noise import NoisePlan, one_ulp_away, pick_sample, run_noise
from lazarus.engine.pair import ModelPair, check_shapes, learn_pair
from lazarus.engine.positions import Position, check_positions
from lazarus.engine.probe import Conventions, learn
from lazarus.engine.recorder import Site, StatePair
from lazarus.engine.resident import run_pairs

__all__ = [
    "Conventions",
    "Head",
    "ModelPair",
    "NoisePlan",
    "Position",
    "Site",
    "StatePair",
    "check_positions",
    "check_shapes",
    "learn",
    "learn_pair",
    "one_ulp_away",
    "pick_sample",
    "run_noise",
    "run_pairs",
]
