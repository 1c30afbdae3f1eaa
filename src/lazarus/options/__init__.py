"""Every option of every command, its default and what it may be. No torch here.

option.py      what an option is: its help, panel and check, and how a record of options is read
common.py      the options that several commands have
checks.py      what an option may be, whichever command it belongs to
activation.py  the options of activation-diff; values.py what those say that are written as text
weights.py     the options of weight-diff
lens.py        the options of compare
record.py      the options of record
series.py      the options of series
"""

from lazarus.options.activation import (
    ALIGNMENTS,
    MEMORY_MODES,
    OptionArguments,
    Options,
    read_template,
)
from lazarus.options.checks import DTYPES, EXPECTATIONS
from lazarus.options.lens import CompareArguments, CompareOptions, parse_track
from lazarus.options.option import check
from lazarus.options.record import RecordArguments, RecordOptions
from lazarus.options.series import SeriesArguments, SeriesOptions
from lazarus.options.values import (
    EACH_TOKEN,
    NAMED_POSITIONS,
    check_token_prompts,
    parse_position,
    parse_readout,
    parse_token_prompts,
    readout_layers,
)
from lazarus.options.weights import WeightArguments, WeightOptions

__all__ = [
    "ALIGNMENTS",
    "DTYPES",
    "EACH_TOKEN",
    "EXPECTATIONS",
    "MEMORY_MODES",
    "NAMED_POSITIONS",
    "CompareArguments",
    "CompareOptions",
    "OptionArguments",
    "Options",
    "RecordArguments",
    "RecordOptions",
    "SeriesArguments",
    "SeriesOptions",
    "WeightArguments",
    "WeightOptions",
    "check",
    "check_token_prompts",
    "parse_position",
    "parse_readout",
    "parse_token_prompts",
    "parse_track",
    "read_template",
    "readout_layers",
]
