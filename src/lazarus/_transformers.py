"""The private names of transformers, each imported when it is used.

From one minor version to the next such a name moves, takes other arguments, or is not there yet. Each
function here takes the same arguments whichever version is installed. What a version cannot do at all, a
function that begins with `can_` tells.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields
from functools import cache
from threading import RLock
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lazarus.errors import MissingPackageError

BUILDING = RLock()
"""Held while transformers builds a model or finishes one: it puts functions of its own in the place of
torch's and of its models', for all threads, and where two threads do so at once, they stay there."""

VERSION: str = transformers.__version__
OLDEST = "5.5"
"""older ones are refused: a config.json can make them run code from the Hub (CVE-2026-4372, CVE-2026-5241)"""


def check_version(version: str) -> None:
    """Refuse a version of transformers that is too old.

    Raises:
        MissingPackageError: it is older than `OLDEST`.
    """
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
        raise MissingPackageError(
            f"lazarus needs transformers {OLDEST} or newer, and {version} is installed. Install it with "
            f"`pip install 'transformers>={OLDEST},<6'`."
        )


check_version(VERSION)


# --- a checkpoint's files and an empty model ----------------------------------------------------


def checkpoint_files(
    path: str, where: Mapping[str, Any], explicit: str | None, *, pickled: bool
) -> list[str]:
    """Return the files of weights that `from_pretrained` would read, fetched from the Hub if need be.

    `where` is the revision and the subfolder, and `explicit` a file that the configuration names. With
    `pickled`, .bin files too.
    """
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    files, _ = _get_resolved_checkpoint_files(
        pretrained_model_name_or_path=path,
        variant=None,
        gguf_file=None,
        use_safetensors=None if pickled else True,
        user_agent=None,  # of an empty one transformers makes a header that no HTTP library sends
        is_remote_code=True,  # else it asks the Hub to convert a repository of pickled weights
        transformers_explicit_filename=explicit,
        download_kwargs=dict(where),
    )
    return list(files or [])


def registered_class(auto: Any, config: Any) -> Any:
    """Return the class of model that an Auto class makes of a configuration; any other class is itself."""
    if not hasattr(auto, "_model_mapping"):
        return auto
    found = auto._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, list | tuple) else found


def has_causal_class(config: Any) -> bool:
    """Return whether transformers has a causal language model for a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def is_model_class(found: object) -> bool:
    """Return whether an attribute of transformers is a class of models that can be run."""
    from transformers import PreTrainedModel

    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    # A base class has torch's own `forward`, which says that there is none.
    return is_model and getattr(found, "forward", None) is not PreTrainedModel.forward


def empty_model(kind: type[PreTrainedModel], config: Any, files: list[str], dtype: Any) -> PreTrainedModel:
    """Build a model on no device, as `from_pretrained` does before it reads weights.

    `dtype` may be "auto"; the configuration is changed.
    """
    from transformers.modeling_utils import _get_dtype
    from transformers.monkey_patching import patch_output_recorders

    config, dtype = _get_dtype(dtype, files, config, None, None, True)
    with BUILDING, ExitStack() as contexts:
        for context in kind.get_init_context(dtype, False, False, None):
            contexts.enter_context(context)
        model = kind(config)
    patch_output_recorders(model)
    return model


# --- from stored tensors to parameters ----------------------------------------------------------


class Renaming:
    """transformers' rules by which the stored tensors of a model become its parameters."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        # One list for all calls: some renamings hold only once an earlier key has been seen.
        self._of(get_model_conversion_mapping(model))
        self._prefix = model.base_model_prefix

    @classmethod
    def of_gguf(cls, architecture: str, config: PretrainedConfig) -> Renaming | None:
        """Return the rules for a GGUF file's tensors; None where transformers has none in this form."""
        try:
            from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported
        except ImportError:  # before 5.17 there is the older form alone
            return None
        if not is_gguf_arch_supported(architecture):
            return None
        rules = cls.__new__(cls)
        rules._of(get_gguf_conversion_mapping(architecture, config))
        rules._prefix = None
        return rules

    def _of(self, entries: list[Any]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.mapping = entries
        self._renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in entries if isinstance(entry, WeightConverter)]

    def rename(
        self, key: str, names: Mapping[str, Any] | None, *, renames: bool = True, converts: bool = True
    ) -> tuple[str, str | None]:
        """Return a key's name in the model, and the pattern of the conversion that collects it, if any.

        `names` is the model's state dict, which decides about the base model's prefix.
        """
        from transformers.core_model_loading import rename_source_key

        found: tuple[str, str | None] = rename_source_key(
            key,
            self._renamings if renames else [],
            self.converters if converts else [],
            self._prefix,
            names,
        )
        return found


def keeps_order(converter: Any) -> bool:
    """Return whether a conversion keeps every stored tensor as it is, as a part of what it makes."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    return all(type(step) in (Concatenate, MergeModulelist) for step in converter.operations)


# --- converting: sharing tensors between two models, reading one block by block ------------------


def dtype_plan(model: PreTrainedModel) -> dict[str, Any]:
    """Return which parameters of a model have another dtype than the rest."""
    return dict(model._get_dtype_plan(model.config.dtype))


def load_config(device: torch.device, dtype: Any, plan: Mapping[str, Any], mapping: Sequence[Any]) -> Any:
    """Return what `put_into` and `finish` take besides a model."""
    from transformers.modeling_utils import LoadStateDictConfig

    return LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=plan,
        weight_mapping=mapping,
        ignore_mismatched_sizes=True,
    )


def put_into(model: PreTrainedModel, tensors: Mapping[str, Any], config: Any, *, shows_bar: bool) -> Any:
    """Put what these stored tensors make into a model, and return transformers' report.

    With `shows_bar` transformers draws its bar, unless its bars are switched off.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model as convert

    no_plan = {"tp_plan": None} if "tp_plan" in inspect.signature(convert).parameters else {}  # until 5.12
    with nullcontext() if shows_bar else _without_bars():
        report, _ = convert(model, dict(tensors), config, **no_plan)
    return report


def finish(model: PreTrainedModel, report: Any, config: Any) -> dict[str, Any]:
    """Make what the files do not hold as `from_pretrained` does: initial values, buffers, tied weights.

    Returns the report as `from_pretrained` gives it.
    """
    with BUILDING:
        return dict(model._finalize_model_loading(model, config, report).to_dict())


@contextmanager
def _without_bars() -> Iterator[None]:
    """Show no progress: there would be a bar for each block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# --- GGUF, quantisation, caches, tokenizers -----------------------------------------------------


def gguf_processor(architecture: str, config: PretrainedConfig) -> Any:
    """Return what turns the tensors of a GGUF architecture into transformers' layout, in the older form."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())


def gguf_names(model: Any, processor: Any) -> dict[str, str]:
    """Return the model's names of a GGUF file's tensors, in the older form."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    found: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    return found


def knows_quantisation(settings: Any) -> bool:
    """Return whether transformers can read a quantisation, by a configuration's `quantization_config`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = settings.get("quant_method")
    if method == "fp8" and "weight_block_size" not in settings:
        # AutoFP8's, whose scales have another name: the codes would be read as elements.
        return False
    is_bitsandbytes = settings.get("load_in_8bit") or settings.get("load_in_4bit")
    return bool(is_bitsandbytes) or method in AUTO_QUANTIZATION_CONFIG_MAPPING


def can_run_quantised(settings: Any, device: torch.device) -> bool:
    """Return whether transformers can run quantised weights on a device as they are.

    By a configuration's `quantization_config`: it may need a package, or kernels that a CPU does not have.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    if not knows_quantisation(settings):
        return False
    try:
        # On a copy: checking the environment may switch the settings to dequantise.
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=True)
        quantizer.validate_environment(device_map={"": device}, dtype=None, weights_only=True)
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError):
        return False
    # It quantises by these, and reads nothing that is: parameters stay random.
    if quantizer.quantization_config.quant_method in ("hqq", "quanto"):
        return False
    # Two of its quantisers dequantise by themselves where they find no GPU.
    return not getattr(quantizer.quantization_config, "dequantize", False)


@cache
def cache_name() -> str:
    """Return what a forward pass takes its KV cache as, and gives it back as."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


@cache
def kv_layers() -> tuple[type, ...]:
    """Return the layers of a `DynamicCache` that hold keys and values, and nothing else."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return DynamicLayer, DynamicSlidingWindowLayer


@cache
def idle_layers() -> tuple[type, ...]:
    """Return the layers of a `DynamicCache` that hold nothing: those of blocks without attention."""
    from transformers import cache_utils

    return (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character stands for in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
