"""The data of a page's scripts: JSON that may stand inside a script element, and matrices as bytes."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

# In HTML, only `<` can end a script element. U+2028 and U+2029 ended lines of JavaScript before ES2019.
_UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")


def in_script(value: object) -> str:
    r"""JSON that can stand inside a script element whatever texts are in it.

    >>> in_script("</script>")
    '"\\u003c/script>"'
    """
    # NaN and Infinity, which Python writes by default, are no JSON.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def matrix(values: NDArray[np.float64]) -> dict[str, Any]:
    """A matrix [rows, columns] as its shape and its bytes.

    >>> matrix(np.array([[1.0]]))
    {'rows': 1, 'columns': 1, 'base64': 'AAAAAAAA8D8='}
    """
    # Little-endian on every machine, as the browser reads it.
    data = np.ascontiguousarray(values, dtype="<f8").tobytes()
    return {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "base64": base64.b64encode(data).decode("ascii"),
    }
