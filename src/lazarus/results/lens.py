"""The record of compare and its parts: the logit lens of two models on one prompt."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from lazarus.results.lens_glossary import LENS_METRICS
from lazarus.results.records import Environment, ModelInfo, Tool
from lazarus.results.rows import Layer, Record

Probability = Annotated[float | None, LENS_METRICS["probability"].meta]


class LensToken(Record, frozen=True, kw_only=True):
    """A token of a layer's distribution."""

    token: Annotated[str, Meta(description="its text")]
    token_id: Annotated[int, Meta(ge=0)]
    probability: Probability


class LensLayer(Record, frozen=True, kw_only=True):
    """Reading of the lens from the output of one block, at the last position."""

    layer: Layer
    top: Annotated[
        list[LensToken],
        Meta(
            description="the most probable tokens, settings.top_k of them; none if the logits are not "
            "finite, or the layer was not recorded"
        ),
    ]


class TokenEvolution(Record, frozen=True, kw_only=True):
    """A tracked token in one model, layer by layer."""

    tracked: Annotated[str, Meta(description="what is tracked, as it was given")]
    token: Annotated[str | None, Meta(description="the model's own token for it; null where it has none")]
    token_id: int | None
    emergence_layer: Annotated[
        Layer | None,
        Meta(description="the first layer from which it is the lens's first choice at every later layer"),
    ]
    final_probability: Probability
    probability: Annotated[list[Probability], Meta(description="at each layer")]
    rank: Annotated[list[int | None], Meta(description="at each layer, from 1; tokens more probable, plus 1")]


class LensModel(Record, frozen=True, kw_only=True):
    """One of the two models: what it read, and what its lens reads from it."""

    info: ModelInfo
    n_vocabulary: Annotated[int, Meta(ge=1, description="tokens that the head has a logit for")]
    prompt_tokens: Annotated[list[str], Meta(description="the prompt as the model reads it")]
    rendered: Annotated[str | None, Meta(description="what a chat template made of the prompt")]
    layers: list[LensLayer]
    tracked: Annotated[list[TokenEvolution], Meta(description="in the order of the result's tracked")]


class LensPair(Record, frozen=True, kw_only=True):
    """A layer of model 1 and its counterpart in model 2: how far apart the two lenses are."""

    layer: Layer
    model2_layer: Layer
    kl_1_2: Annotated[float | None, LENS_METRICS["kl_1_2"].meta]
    kl_2_1: Annotated[float | None, Meta(description="KL(model 2‖model 1), nats")]
    js: Annotated[float | None, LENS_METRICS["js"].meta]
    same_first_choice: bool | None


class LensSettings(Record, frozen=True, kw_only=True):
    """Every option that the run used; `auto` is replaced by what it came to."""

    top_k: int
    track: list[str] | None
    dtype: str
    device: str
    chat_template: str
    truncate: bool
    layers_path: str | None
    seed: int
    trust_remote_code: bool
    no_digests: bool = False
    dequantize: str = "auto"
    at: str = "last"
    anonymous: bool = False


class LensSummary(Record, frozen=True, kw_only=True):
    """The few numbers that a reader looks for first; null where there is none."""

    same_first_choice: Annotated[bool | None, Meta(description="both end with the same first choice")]
    most_divergent_layer: Annotated[
        Layer | None, Meta(description="where js is largest, in model 1's layers")
    ]
    max_js: float | None
    same_vocabulary: Annotated[
        bool, Meta(description="the same tokens have the same ids; else they are compared by their text")
    ]


class CompareRecord(Record, frozen=True, kw_only=True):
    """The whole result of compare: the object that JSON holds."""

    schema_version: Literal["1.0"]
    command: Literal["compare"]
    tool: Tool
    created: Annotated[str, Meta(description="ISO 8601, UTC")]
    model1: LensModel
    model2: LensModel
    settings: LensSettings
    environment: Environment
    prompt: Annotated[str, Meta(description="what the user gave, whole")]
    tracked: Annotated[list[str], Meta(description="texts of the tracked tokens")]
    layers: list[LensPair]
    summary: LensSummary
    position: Annotated[
        int | None, Meta(description="of the token that is read, in the prompt, from 0; it ends there")
    ] = None
    notes: list[str]
    note_codes: list[str] = field(default_factory=list)
