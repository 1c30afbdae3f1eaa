"""The mean difference of every layer as a file of safetensors: steering vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from lazarus.errors import OutputError
from lazarus.results import ActivationDiffRecord


def write_vectors(
    record: ActivationDiffRecord, stream: IO[bytes], *, vectors: Mapping[str, NDArray[np.float32]] | None
) -> None:
    """Write δ̄ of each layer as the tensor `resid_post.N`, float32 [hidden], with what it is of as metadata.

    Raises:
        OutputError: the result was read from a file, or the models are of two widths.
    """
    from safetensors.numpy import save

    widths = record.base.hidden_size, record.finetuned.hidden_size
    if widths[0] != widths[1]:
        raise OutputError(
            f"states of {widths[0]} and {widths[1]} features have no difference, so there are no vectors to "
            "save. Leave this output out."
        )
    if vectors is None:
        raise OutputError(
            "the mean differences are not kept in a saved result. Run the comparison again with "
            "-o FILE.safetensors."
        )
    about = {
        "tool": f"{record.tool.name} {record.tool.version}",
        "created": record.created,
        "what": "mean over prompts of each prompt's mean difference, finetuned - base, after block N of base",
        "base": record.base.id,
        "finetuned": record.finetuned.id,
        "position": record.settings.position,
        "n_prompts": len(record.prompts),
        "dtype": record.settings.dtype,
        "finetuned_layers": [
            row.layer if row.finetuned_layer is None else row.finetuned_layer for row in record.layers
        ],
    }
    # Under one key: of several, safetensors writes them in another order each time.
    stream.write(save(dict(vectors), {"lazarus": msgspec.json.encode(about).decode()}))
