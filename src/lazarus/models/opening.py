"""A checkpoint before its weights are read: its configuration, the class that loads it, its stored dtype."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lazarus import _transformers
from lazarus.errors import UnsupportedModelError, WeightsError
from lazarus.foreign import read_json
from lazarus.messages import option
from lazarus.models.checkpoint import find_files
from lazarus.models.contents import NOTHING_BESIDE, Contents, look_for_weights, survey
from lazarus.models.embedders import add_modules
from lazarus.models.faults import translated
from lazarus.models.files import ReadFiles
from lazarus.models.formats import check_folder
from lazarus.models.gguf.opening import OpenedGguf, open_gguf, usual_type
from lazarus.models.gguf.parts import read_files
from lazarus.models.plausible import check_config, check_weights
from lazarus.models.quantised import (
    UNKNOWN,
    CodedTensor,
    Codes,
    Weight,
    can_decode,
    check_claim,
    claimed_method,
    is_left_over,
    stored_codes,
)
from lazarus.models.reference import Source
from lazarus.models.stored import read_headers
from lazarus.notes import Notes

_SAFETENSORS_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CLAIMED_BY = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quanto_qmap.json": "quanto",
}
"""files that say how weights are quantised where config.json does not, and the method that writes each"""
_CONV1D = {"gpt2", "openai-gpt", "decision_transformer", "imagegpt"}
"""families with modules of transformers' `Conv1D`, whose weights have rows for inputs"""
_TRANSPOSE = {"auto-round", "bitsandbytes", "gptq"}
"""methods that quantise these modules, and store their weights as those of `Linear`"""
_SAFETENSORS_DTYPES = {getattr(torch, dtype): name for name, dtype in _SAFETENSORS_NAMES.items()}


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading; `dtype` is None for the stored one."""

    dtype: torch.dtype | None
    device: torch.device
    trust_remote_code: bool = False
    layers_path: str | None = None
    dequantize: str = "auto"
    digests: bool = True


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose configuration was read; `model_class` loads it, and may be an Auto class."""

    source: Source
    config: Any
    model_class: Any
    quantised: bool
    left_over: str | None = None
    """a quantisation that config.json claims, and that is not that of the stored weights"""
    gguf: OpenedGguf | None = None
    codes: Codes | None = None
    """the quantisation of its weights, where they are decoded as they are read"""
    contents: Contents = NOTHING_BESIDE
    files: ReadFiles = field(default_factory=lambda: ReadFiles(""))
    """what of it is read, as it was before that"""

    @property
    def untaken(self) -> Mapping[str, Any]:
        """The settings of a GGUF file that transformers has no place for."""
        return self.gguf.untaken if self.gguf else {}

    def note(self, notes: Notes) -> None:
        """Note what a reader must know of how the checkpoint was opened."""
        self.source.note(notes)
        if self.contents.note is not None:
            notes.extend([self.contents.note])
        if self.gguf is not None:
            notes.extend(self.gguf.notes)
        if self.codes is not None:
            notes.add(
                "weights-dequantised",
                f"{self.source.name}: its weights ({self.codes.method}) were dequantised as they were read; "
                + _left_out(self.codes.activations),
                model=self.source.name,
            )
        if self.left_over is not None:
            notes.add(
                "quantisation-claim",
                f"{self.source.name}: config.json claims that its weights are quantised ({self.left_over}), "
                "and none of them is: it was read as it is stored",
                model=self.source.name,
            )


def _left_out(activations: str | None) -> str:
    """Return what else a quantisation does, and was not applied."""
    if activations is None:
        return "it quantises weights alone"
    if activations == UNKNOWN:
        return "whether it quantises activations too is not known, and that was not applied"
    return f"its quantisation of activations ({activations}) was not applied"


def open_checkpoint(source: Source, options: LoadOptions) -> Opened:
    """Read a checkpoint's configuration.

    Raises:
        ModelError: it cannot be read, or asks for what is not installed.
    """
    if source.gguf_file:
        gguf = open_gguf(source)
        files = ReadFiles(source.name, hashed=options.digests)
        files.add(Path(gguf.file.paths[0]).parent, gguf.file.paths)
        return Opened(
            source, gguf.config, _model_class(gguf.config, source), quantised=False, gguf=gguf, files=files
        )
    check_folder(source)
    check_config(source)
    with translated(source.name):
        where = source.where(trust_remote_code=options.trust_remote_code)  # the files are there from now on
        files = ReadFiles(source.name, hashed=options.digests)
        if (found := source.file("config.json")) is not None:
            files.add_settings(Path(found).parent, source.prefix)
        add_modules(files, source)
        config = AutoConfig.from_pretrained(source.path, **where)
        return Opened(
            source, config, _model_class(config, source), claimed_method(config) is not None, files=files
        )


def _model_class(config: Any, source: Source) -> Any:
    """Return the model class that a checkpoint names, in which every one of its tensors has a place.

    Raises:
        UnsupportedModelError: it names something else of transformers.
    """
    named = config.architectures or ()
    for name in named if isinstance(named, list | tuple) else (named,):
        # A model with code of its own may name a class that transformers does not have.
        if (own := getattr(transformers, str(name), None)) is None:
            continue
        if not _transformers.is_model_class(own):
            raise UnsupportedModelError(
                f"{source.name}: config.json names the architecture {name!r:.60}, which is no model class of "
                "transformers. Write the class that the weights are of, or fetch config.json again."
            )
        return own
    remote = getattr(config, "auto_map", None) or {}
    if _transformers.has_causal_class(config) or "AutoModelForCausalLM" in remote:
        return AutoModelForCausalLM
    return AutoModel


def open_to_load(source: Source, options: LoadOptions) -> Opened:
    """Read a checkpoint's configuration, and look at what its folder holds.

    Raises:
        ModelError: it cannot be read, asks for what is not installed, or does not hold what it says.
    """
    opened = open_checkpoint(source, options)
    if source.gguf_file:
        return opened
    opened = find_weights(opened)[0]
    return decoding(opened) if _is_decoded(opened, options) else opened


def find_weights(opened: Opened, *, pickled: bool = False) -> tuple[Opened, list[str]]:
    """Find a checkpoint's files of weights, and check what its configuration claims against them.

    With `pickled`, .bin files do where there are no safetensors.

    Raises:
        ModelError: there are none, there are two sets, or what they hold is not what config.json says.
    """
    source = opened.source
    look_for_weights(source)
    with translated(source.name):
        files = find_files(source, opened.config, opened.model_class, pickled=pickled)
        opened.files.add(os.path.dirname(files[0]), files, source.prefix)
        opened = replace(opened, contents=survey(source, files))
        if not all(file.endswith(".safetensors") for file in files):
            return opened, files
        stored = read_headers(files)
    check_weights(source, stored)
    if opened.quantised and is_left_over(stored):
        config = copy.deepcopy(opened.config)
        # With the claim in it, `from_pretrained` would read plain weights as codes of a quantiser.
        del config.quantization_config
        left_over = claimed_method(opened.config)
        return replace(opened, config=config, quantised=False, left_over=left_over), files
    if not opened.quantised and next(stored_codes(stored), None) is not None:
        opened = _claiming(opened)
    check_claim(source.name, opened.config, stored)
    return opened, files


def _claiming(opened: Opened) -> Opened:
    """Return a checkpoint of codes with the quantisation that another file claims, where one does.

    Raises:
        WeightsError: that file is damaged.
    """
    settings = getattr(opened.config, "compression_config", None)
    settings = settings and {"quant_method": "compressed-tensors", **settings}
    for name, method in _CLAIMED_BY.items():
        if not settings and (path := opened.source.file(name)) is not None:
            found = read_json(path, WeightsError, "Fetch the model again.")
            if not isinstance(found, dict):
                raise WeightsError(f"{path}: is damaged: it holds no JSON object. Fetch the model again.")
            settings = {"quant_method": method, **found}
    if not settings:
        return opened
    config = copy.deepcopy(opened.config)
    config.quantization_config = settings
    return replace(opened, config=config, quantised=True)


def _is_decoded(opened: Opened, options: LoadOptions) -> bool:
    """Return whether the weights of a checkpoint are dequantised here, and not by transformers.

    Raises:
        UnsupportedModelError: it must be left to transformers, which does not know its quantisation.
    """
    if not opened.quantised:
        return False
    if options.dequantize == "never":
        if _transformers.knows_quantisation(opened.config.quantization_config):
            return False
        raise UnsupportedModelError(
            f"{opened.source.name}: its weights are quantised by {claimed_method(opened.config)!r}, which "
            f"transformers does not know, and {option('dequantize', 'never')} leaves them to it. Leave the "
            "option out.",
            option="dequantize",
        )
    if options.dequantize == "always":
        return True
    has_kernels = _transformers.can_run_quantised(opened.config.quantization_config, options.device)
    return can_decode(claimed_method(opened.config)) and not has_kernels


def decoding(opened: Opened) -> Opened:
    """Return a quantised checkpoint as one whose weights are dequantised as they are read.

    Raises:
        UnsupportedModelError: its modules are of a kind that is stored transposed.
    """
    settings, config = opened.config.quantization_config, copy.deepcopy(opened.config)
    method = claimed_method(opened.config) or ""
    if method in _TRANSPOSE and config.model_type in _CONV1D:
        raise UnsupportedModelError(
            f"{opened.source.name}: {method} stores the weights of {config.model_type} transposed, which is "
            "not decoded. Compare an unquantised checkpoint."
        )
    # `from_pretrained` and the model itself take the claim for a promise of codes.
    del config.quantization_config
    plain = settings if isinstance(settings, Mapping) else settings.to_dict()
    dtype = _SAFETENSORS_DTYPES.get(getattr(config, "dtype", None), "BF16")
    codes = Codes(opened.source.name, method, plain, dtype)
    return replace(opened, config=config, quantised=False, codes=codes)


def stored_weights(opened: Opened) -> Mapping[str, Weight]:
    """Return the tensors of a checkpoint by their keys, each read when it is asked for.

    Raises:
        ModelError: they cannot be found, or not decoded.
    """
    stored = read_headers(find_files(opened.source, opened.config, opened.model_class))
    return stored if opened.codes is None else opened.codes.weights(stored)


def stored_dtype(opened: Opened) -> str | None:
    """The dtype of most of the stored elements, by the headers of the files that were read."""
    counts: Counter[str] = Counter()
    source = opened.source
    if source.gguf_file:
        return usual_type(read_files(source))
    if opened.codes is not None:
        for weight in stored_weights(opened).values():
            if isinstance(weight, CodedTensor):
                name = weight.decoder.precision.scheme
            else:
                name = _SAFETENSORS_NAMES.get(weight.dtype, weight.dtype)
            counts[name] += prod(weight.shape)
        return counts.most_common(1)[0][0]
    for path in find_files(source, opened.config, opened.model_class):
        counts += _dtypes_in(Path(path))
    return counts.most_common(1)[0][0] if counts else None


def _dtypes_in(path: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    try:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                part = tensors.get_slice(key)
                counts[_SAFETENSORS_NAMES.get(part.get_dtype(), part.get_dtype())] += torch.Size(
                    part.get_shape()
                ).numel()
    except SafetensorError:  # not one of the files that were loaded: those were readable
        return Counter()
    return counts
