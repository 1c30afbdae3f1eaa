"""The logit lens on every causal architecture of transformers: the last layer must be the model's own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from architectures import CAUSAL, ENCODER_DECODERS, REFUSED, UNBUILDABLE, WITHOUT_HEAD, build
from factories import word_tokenizer
from lazarus.engine import learn
from lazarus.errors import UnsupportedModelError
from lazarus.lens import compare_models
from lazarus.lens.reading import read_layers
from lazarus.models import wrap_model
from reference import run_whole

IDS = [64, 27, 50, 23, 8, 91, 36, 70, 19]
MIXED = {"inkling2_loop_text", "inkling2_text"}
READ = [name for name in CAUSAL if name not in {*UNBUILDABLE, *REFUSED, *WITHOUT_HEAD, *MIXED}]
Floats = NDArray[np.float64]


def read(model: PreTrainedModel, ids: list[int] = IDS) -> torch.Tensor:
    wrapped = wrap_model(model, "the model")
    return read_layers(wrapped, learn(wrapped, ids, 100), ids, lambda _: None)


@pytest.mark.parametrize("name", READ)
def test_the_last_layer_is_the_models_own_next_token(name: str) -> None:
    model = build(name)
    found = read(model)
    own = run_whole(model, IDS).logits[0, -1]
    assert found.shape[0] >= len(found) >= 2
    assert found[-1].shape == own.shape
    assert (found[-1] - own).abs().max() <= 1e-5 * max(1.0, float(own.abs().max()))
    assert not torch.allclose(found[0], found[-1], rtol=1e-3)
