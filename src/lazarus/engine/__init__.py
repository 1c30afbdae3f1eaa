"""Run the pair: the same batches through both models, and out come pairs of states.

positions.py   which rows of a batch are compared
recorder.py    the states at every site of one model's forward pass
probe.py       one short pass that learns how a model's blocks behave, and checks it
resident.py    both models in memory, batch by batch
"""

from lazarus.engine.positions import Position, check_positions
from lazarus.engine.probe import Conventions, learn
from lazarus.engine.recorder import Site, StatePair
from lazarus.engine.resident import ModelPair, learn_pair, run_pairs

__all__ = [
    "Conventions",
    "ModelPair",
    "Position",
    "Site",
    "StatePair",
    "check_positions",
    "learn",
    "learn_pair",
    "run_pairs",
]
