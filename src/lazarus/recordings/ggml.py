"""llama-cpp-python, imported when it is used, and the tensors that are read while llama.cpp runs."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import MissingPackageError, UnsupportedModelError
from lazarus.recordings.sites import EMBEDDING, FINAL_NORM, LOGITS, site_name

PACKAGE = "llama-cpp-python"
ENTERS_THE_FIRST_BLOCK = (
    "inp_embd",
    "embd",
    "inp_scaled",
    "inp_embd_scaled",
    "inpL",
    "inp_norm",
    "inp_norm-0",
    "embd_norm",
    "model.input_embed",
    "model.embed_tokens",
    "embedding_output",
)
"""What llama.cpp calls an embedding: looked up, scaled, with positions, normalised. The last one counts."""
BLOCK_OUTPUT = "l_out-"
OTHERS = {"result_norm": FINAL_NORM, "result_output": LOGITS}

Rows = NDArray[np.float32]
"""[tokens, width]"""


class Taps:
    """The callback in which tensors are read, and those that it has read."""

    def __init__(self, library: Any, n_layers: int, *, logits: bool) -> None:
        self._ggml = ggml_base(library)
        self._blocks = {f"{BLOCK_OUTPUT}{layer}": site_name(layer) for layer in range(n_layers)}
        self._sites = dict.fromkeys(ENTERS_THE_FIRST_BLOCK, EMBEDDING) | self._blocks
        self._sites |= {name: site for name, site in OTHERS.items() if logits or site != LOGITS}
        self._n_rows = 0
        self._read: dict[str, Rows] = {}
        self.callback = library.ggml_backend_sched_eval_callback(self._evaluated)

    def begin(self, n_rows: int) -> None:
        """Forget what was read; the next run has so many tokens."""
        self._n_rows, self._read = n_rows, {}

    def found(self, path: Path, architecture: str) -> dict[str, Rows]:
        """Return what was read, in the order of the model.

        Raises:
            UnsupportedModelError: something was not there, or not in float32 with a row a token.
        """
        order = list(dict.fromkeys(self._sites.values()))
        missing = [site for site in order if site not in self._read]
        if missing:
            raise UnsupportedModelError(
                f"{path}: llama.cpp names no tensor of {architecture} that is {missing[0]}, with "
                "a row of float32 for every token."
            )
        return {site: self._read[site] for site in order}

    def _evaluated(self, tensor: int, ask: bool, _data: int | None) -> bool:
        """Answer which tensors are wanted, and read them when they are there. An error must not leave it."""
        name = self._ggml.ggml_get_name(tensor).decode(errors="replace")
        site = self._sites.get(name)
        if ask:
            return site is not None
        n_bytes = self._ggml.ggml_nbytes(tensor)
        if site is not None and n_bytes == 4 * self._ggml.ggml_nelements(tensor):
            array = np.empty(n_bytes // 4, dtype=np.float32)
            if array.size % self._n_rows == 0:
                self._ggml.ggml_backend_tensor_get(tensor, array.ctypes.data, 0, n_bytes)
                self._read[site] = array.reshape(self._n_rows, -1)
        return True


def imported() -> Any:
    """Import llama-cpp-python.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return import_module("llama_cpp")
    except ImportError as error:
        raise MissingPackageError(
            f"Running a GGUF file in llama.cpp needs the package {PACKAGE}. Install it with "
            "`pip install 'lazarus-introspect[llama-cpp]'`, which builds it (minutes, with a C++ compiler)."
        ) from error


def ggml_base(library: Any) -> Any:
    """Load the library of llama-cpp-python that knows a tensor's name, size and data."""
    places = sorted((Path(library.__file__).parent / "lib").glob("*ggml-base.*"), key=lambda p: len(p.name))
    if not places:
        raise MissingPackageError(
            f"{PACKAGE} {library.__version__} at {library.__file__} has no libggml-base. Install 0.3.36."
        )
    base: Any = ctypes.CDLL(str(places[0]))
    signatures: dict[str, tuple[Any, Sequence[Any]]] = {
        "ggml_get_name": (ctypes.c_char_p, [ctypes.c_void_p]),
        "ggml_nelements": (ctypes.c_int64, [ctypes.c_void_p]),
        "ggml_nbytes": (ctypes.c_size_t, [ctypes.c_void_p]),
        "ggml_backend_tensor_get": (
            None,
            [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    return base


@contextmanager
def quiet() -> Iterator[None]:
    """Let llama.cpp tell of errors alone."""
    logger = logging.getLogger(PACKAGE)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
