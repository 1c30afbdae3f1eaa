"""Results as plain data; free of torch.

glossary.py   what each number is called and means; weight_glossary.py and lens_glossary.py those of
              weight-diff and compare
rows.py       one row a prompt and layer, held as columns
outside.py    what a checkpoint holds besides what was compared
measured.py   the numbers of activation-diff, by what they are of
records.py    the record of activation-diff
weights.py    the record of weight-diff
lens.py       the record of compare
estimate.py   what a run would take
series.py     the record of series; series_glossary.py its numbers
consistency.py   whether the parts of a record that was read contradict each other
anonymous.py  a record without the paths of the machine
document.py   the record as JSON, and the JSON Schema
flags.py      which layers are above a threshold
"""

from lazarus.results.document import json_schema, read_json, write_json
from lazarus.results.estimate import Estimate, EstimatedPart
from lazarus.results.flags import flag_above
from lazarus.results.glossary import METRICS, Metric
from lazarus.results.lens import (
    CompareRecord,
    LensLayer,
    LensModel,
    LensPair,
    LensSettings,
    LensSummary,
    LensToken,
    TokenEvolution,
)
from lazarus.results.lens_glossary import LENS_METRICS
from lazarus.results.measured import (
    AttributedGroup,
    Attribution,
    ComponentRecord,
    GroupContrast,
    GroupCurve,
    Groups,
    LayerRecord,
    LocalChange,
    Measures,
    Mined,
    MinedToken,
    Output,
    Parting,
    Readout,
    ReadoutToken,
    Restored,
    Scores,
    SiteRecord,
    TokenChoice,
    TokenTrace,
)
from lazarus.results.outside import BROKEN, SETTING, NotCompared, ReadFile, differing, note_outside, told
from lazarus.results.records import (
    SCHEMA_VERSION,
    ActivationDiffRecord,
    Environment,
    ModelInfo,
    PromptRecord,
    Settings,
    Summary,
    Tool,
    Verdict,
)
from lazarus.results.rows import ResultRow, ResultRows, finite_or_none
from lazarus.results.series import (
    FindingKind,
    Predecessor,
    SeriesFinding,
    SeriesMember,
    SeriesRecord,
    natural,
    steps_of,
)
from lazarus.results.series_glossary import SERIES_METRICS
from lazarus.results.weight_glossary import WEIGHT_METRICS
from lazarus.results.weights import (
    CheckpointInfo,
    CopiedLayers,
    Quantisation,
    Spectrum,
    TensorRecord,
    UnmatchedTensor,
    WeightDiffRecord,
    WeightLayerRecord,
    WeightSettings,
    WeightSummary,
    WeightVerdict,
)

__all__ = [
    "BROKEN",
    "LENS_METRICS",
    "METRICS",
    "SCHEMA_VERSION",
    "SERIES_METRICS",
    "SETTING",
    "WEIGHT_METRICS",
    "ActivationDiffRecord",
    "AttributedGroup",
    "Attribution",
    "CheckpointInfo",
    "CompareRecord",
    "ComponentRecord",
    "CopiedLayers",
    "Environment",
    "Estimate",
    "EstimatedPart",
    "FindingKind",
    "GroupContrast",
    "GroupCurve",
    "Groups",
    "LayerRecord",
    "LensLayer",
    "LensModel",
    "LensPair",
    "LensSettings",
    "LensSummary",
    "LensToken",
    "LocalChange",
    "Measures",
    "Metric",
    "Mined",
    "MinedToken",
    "ModelInfo",
    "NotCompared",
    "Output",
    "Parting",
    "Predecessor",
    "PromptRecord",
    "Quantisation",
    "ReadFile",
    "Readout",
    "ReadoutToken",
    "Restored",
    "ResultRow",
    "ResultRows",
    "Scores",
    "SeriesFinding",
    "SeriesMember",
    "SeriesRecord",
    "Settings",
    "SiteRecord",
    "Spectrum",
    "Summary",
    "TensorRecord",
    "TokenChoice",
    "TokenEvolution",
    "TokenTrace",
    "Tool",
    "UnmatchedTensor",
    "Verdict",
    "WeightDiffRecord",
    "WeightLayerRecord",
    "WeightSettings",
    "WeightSummary",
    "WeightVerdict",
    "differing",
    "finite_or_none",
    "flag_above",
    "json_schema",
    "natural",
    "note_outside",
    "read_json",
    "steps_of",
    "told",
    "write_json",
]
