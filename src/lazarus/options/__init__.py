"""Every option of every command, its default and what it may be. No torch here.

checks.py      what an option may be, whichever command it belongs to
activation.py  the options of activation-diff
weights.py     the options of weight-diff
lens.py        the options of compare
"""

from lazarus.options.activation import (
    ALIGNMENTS,
    MEMORY_MODES,
    NAMED_POSITIONS,
    OptionArguments,
    Options,
    check_token_prompts,
    make_options,
    parse_position,
    parse_readout,
    parse_token_prompts,
    read_template,
    readout_layers,
)
from lazarus.options.checks import DTYPES, EXPECTATIONS, check_bound, check_gates
from lazarus.options.lens import CompareArguments, CompareOptions, make_compare_options, parse_track
from lazarus.options.weights import WeightArguments, WeightOptions, check_weight_gates

__all__ = [
    "ALIGNMENTS",
    "DTYPES",
    "EXPECTATIONS",
    "MEMORY_MODES",
    "NAMED_POSITIONS",
    "CompareArguments",
    "CompareOptions",
    "OptionArguments",
    "Options",
    "WeightArguments",
    "WeightOptions",
    "check_bound",
    "check_gates",
    "check_token_prompts",
    "check_weight_gates",
    "make_compare_options",
    "make_options",
    "parse_position",
    "parse_readout",
    "parse_token_prompts",
    "parse_track",
    "read_template",
    "readout_layers",
]
