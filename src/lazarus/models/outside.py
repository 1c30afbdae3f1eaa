"""Parts of two checkpoints that are not compared, found from their files without loading them.

transformers drops a tensor that has no place in the class that it builds, and says so at most in a warning.
So the files are asked, not the loaded model. A model that the caller has in memory has no files: there it is
what its modules hold outside the text stack.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lazarus.models.checkpoint import KeyMap, find_files
from lazarus.models.contents import Unread
from lazarus.models.embedders import embedder_parts
from lazarus.models.equality import same_bits
from lazarus.models.faults import translated
from lazarus.models.gguf.tensors import read_unplaced
from lazarus.models.loaded import LoadedModel
from lazarus.models.quantised import CodedTensor, Weight, same_weights
from lazarus.models.reference import Source
from lazarus.models.settings import settings_that_differ
from lazarus.models.stored import TORCH_DTYPES, StoredTensor, read_headers
from lazarus.results import SETTING, NotCompared

Held = StoredTensor | CodedTensor | Tensor
"""a tensor in a file, or in memory"""

_KINDS = (
    (r"vision|visual|image|siglip", "vision tower"),
    (r"audio|speech", "audio tower"),
    (r"project|connector|merger|aligner", "projector"),
    (r"pooler", "pooler"),
    (r"(^|\.)score|reward|v_head|value_head", "score head"),
    (r"classif|qa_outputs", "classification head"),
    (r"mtp|nextn|eagle|draft", "draft layers"),
    (r"decoder", "decoder"),
    (r"lm_head|embed_out|cls\.predictions", "LM head"),
)
"""What a group of tensors is usually called, by the first pattern that its path matches."""
_COMPUTED = re.compile(r"(.*\.)?(inv_freq|masked_bias|position_ids)")
"""Buffers that follow from the configuration: older versions of transformers stored them."""
_ADAPTER = re.compile(r"\.(base_layer|token_adapter|modules_to_save\.[^.]+|original_module)(?=\.)")


@dataclass(frozen=True)
class Compared:
    """The tensors of one model that a comparison can see, by their names in the model."""

    modules: frozenset[str]
    """the modules whose own tensors are compared"""
    tensors: frozenset[str]
    """these tensors, in the state dict; of tied ones, all names"""


def find_outside(
    base: LoadedModel, finetuned: LoadedModel, compared: tuple[Compared, Compared], *, embeds: bool = False
) -> tuple[list[NotCompared], list[NotCompared]]:
    """Return what each of two models holds besides what is compared; with `embeds`, embeddings are.

    Raises:
        WeightsError: a file is gone, or was cut short since the model was loaded.
    """
    ours, theirs = (
        _holdings(model, each.tensors) for model, each in zip((base, finetuned), compared, strict=True)
    )
    # With a dot, because a name of PEFT is taken off only in front of one.
    groups = _groups([*ours, *theirs], {_plain(f"{name}.") for each in compared for name in each.modules})
    sides: tuple[list[NotCompared], list[NotCompared]] = ([], [])
    for group, paths in groups.items():
        pairs = [(ours.get(path), theirs.get(path)) for path in paths]
        pairs = [pair for path, pair in zip(paths, pairs, strict=True) if _counts(path, pair)]
        differs = _differ(pairs)
        for side, parts in enumerate(sides):
            n_tensors = sum(pair[side] is not None for pair in pairs)
            if n_tensors:
                parts.append(NotCompared(what=_called(group, paths[0]), n_tensors=n_tensors, differs=differs))
    files = (Beside(m.source, m.model.config, m.unread, m.untaken) for m in (base, finetuned))
    beside = find_beside(*files, embeds=embeds)
    return [*sides[0], *beside[0]], [*sides[1], *beside[1]]


@dataclass(frozen=True)
class Beside:
    """Parts of a checkpoint beside its model's tensors."""

    source: Source | None
    config: PretrainedConfig
    unread: Sequence[Unread]
    untaken: Mapping[str, Any]
    """settings of its file that are not in its configuration"""


def find_beside(
    base: Beside, finetuned: Beside, *, embeds: bool = False
) -> tuple[list[NotCompared], list[NotCompared]]:
    """Return what two checkpoints have beside their model's tensors.

    That is: the modules of a sentence-transformers model, unless with `embeds` what they make is compared;
    other weights in its folder; and settings in which the configurations differ.

    Raises:
        ModelError: the settings or the weights of such a module cannot be read.
    """
    parts = embedder_parts(base.source, finetuned.source, embeds=embeds)
    parts += _unread_parts(base.unread, finetuned.unread)
    parts += _untaken_parts(base.untaken, finetuned.untaken)
    for setting in settings_that_differ(base.config, finetuned.config):
        part = NotCompared(what=f"{SETTING}{setting}", n_tensors=0, differs=True)
        parts.append((part, part))
    return [one for one, _ in parts if one], [other for _, other in parts if other]


def _unread_parts(
    base: Sequence[Unread], finetuned: Sequence[Unread]
) -> Iterator[tuple[NotCompared | None, NotCompared | None]]:
    """The files of weights that were not read; one that is a copy of what was read is no difference."""
    ours, theirs = ({each.name: each for each in side} for side in (base, finetuned))
    for name in dict.fromkeys([*ours, *theirs]):
        pair = ours.get(name), theirs.get(name)
        known = [each for each in pair if each is not None]
        is_same = all(each.is_copy for each in known) or (len(known) == 2 and _same_files(*known))
        part = NotCompared(what=f"weights in {name}", n_tensors=0, differs=False if is_same else None)
        yield (part if pair[0] else None), (part if pair[1] else None)


def _untaken_parts(
    base: Mapping[str, Any], finetuned: Mapping[str, Any]
) -> Iterator[tuple[NotCompared | None, NotCompared | None]]:
    """The settings of the files that neither model runs with; the same value in both is no difference."""
    for name in dict.fromkeys([*base, *finetuned]):
        ours, theirs = base.get(name), finetuned.get(name)
        if ours is not None and ours == theirs:
            continue
        differs = None if ours is None or theirs is None else True
        part = NotCompared(what=f"{SETTING}{name}", n_tensors=0, differs=differs)
        yield (part if name in base else None), (part if name in finetuned else None)


def _same_files(one: Unread, other: Unread) -> bool:
    # Lists of two lengths are no match, by the next line.
    pairs = zip(one.paths, other.paths, strict=False)
    return len(one.paths) == len(other.paths) and all(filecmp.cmp(*pair, shallow=False) for pair in pairs)


def _holdings(model: LoadedModel, compared: AbstractSet[str]) -> dict[str, Held]:
    """A model's tensors that are not compared, by their paths without what an adapter puts around them."""
    return {**_held(model, compared), **{_plain(path): tensor for path, tensor in model.left_out.items()}}


def _held(model: LoadedModel, compared: AbstractSet[str]) -> dict[str, Held]:
    """Return the same, but for what an adapter brings and the model has no place for."""
    held: dict[str, Held]
    names = model.model.state_dict(keep_vars=True)
    if model.source is None or model.source.gguf_file:
        held = {_plain(n): t for n, t in names.items() if n not in compared and isinstance(t, Tensor)}
        if model.source is not None:
            with translated(model.source.name):
                held |= read_unplaced(model.source, type(model.model), model.model.config)
        return held
    with translated(model.source.name):
        files = read_headers(find_files(model.source, model.model.config, type(model.model)))
        stored: Mapping[str, Weight] = files if model.codes is None else model.codes.weights(files)
    keys = KeyMap(model.model, stored, {_plain(name): tensor for name, tensor in names.items()})
    plain = {_plain(name) for name in compared}
    seen = {key for target, found in keys.sources.items() if target in plain for key in found}
    held = {keys.renamed(key): stored[key] for key in stored if key not in seen}
    return held | {_plain(n): names[n] for n in _brought(model) if n not in compared}


def _brought(model: LoadedModel) -> Iterator[str]:
    """The names of the tensors that an adapter brings."""
    adapted = [
        name
        for name, module in model.model.named_modules()
        if hasattr(module, "base_layer") or hasattr(module, "modules_to_save")
    ]
    for name in model.model.state_dict() if adapted else ():
        inside = any(name.startswith(f"{path}.") for path in adapted)
        # Under these two names PEFT keeps what is the model's own.
        if inside and ".base_layer." not in name and ".original_module." not in name:
            yield name


def _plain(name: str) -> str:
    """A tensor's name without the modules that PEFT puts around its own."""
    return _ADAPTER.sub("", name)


def _groups(paths: Iterable[str], modules: AbstractSet[str]) -> dict[str, list[str]]:
    """Return the paths, grouped by the shortest module that holds nothing of what is compared.

    Modules that are alike but for one number, as those of many layers, are one group.
    """
    shared = {name[: dot.start()] for name in modules for dot in re.finditer(r"\.", name)}
    found: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        ends = [dot.start() for dot in re.finditer(r"\.", path)]
        group = next((path[:end] for end in ends if path[:end] not in shared), path)
        found.setdefault(group, []).append(path)
    alike: dict[str, list[str]] = {}
    for group in found:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", group), []).append(group)
    return {
        (pattern if len(groups) > 1 else groups[0]): [path for group in groups for path in found[group]]
        for pattern, groups in alike.items()
    }


def _called(group: str, path: str) -> str:
    """Return what a group is usually called, by its name or by the path of its first tensor."""
    kinds = (name for text in (group, path) for pattern, name in _KINDS if re.search(pattern, text))
    kind = next(kinds, None)
    return group if kind is None else f"{kind} ({group})"


def _counts(path: str, pair: tuple[Held | None, Held | None]) -> bool:
    """Return whether a pair counts: a buffer that both compute and one side alone stores is no difference."""
    # Older versions of transformers stored the causal mask of GPT-2 as `attn.bias`, with four dimensions.
    is_mask = any(held is not None and len(held.shape) == 4 for held in pair) and path.endswith(".bias")
    return None not in pair or not (is_mask or _COMPUTED.fullmatch(path))


def _differ(pairs: Sequence[tuple[Held | None, Held | None]]) -> bool | None:
    """Return whether any of these tensors is another one, or on one side alone.

    None where that is not known.
    """
    unknown = False
    for ours, theirs in pairs:
        same = False if ours is None or theirs is None else _same(ours, theirs)
        if same is False:
            return True
        unknown = unknown or same is None
    return None if unknown else False


def _same(ours: Held, theirs: Held) -> bool | None:
    if isinstance(ours, StoredTensor) and isinstance(theirs, StoredTensor):
        if ours.dtype != theirs.dtype and not {ours.dtype, theirs.dtype} <= _FLOATS:
            return None  # codes of one quantisation, and elements of the other
        return same_weights(ours, theirs)
    if any(isinstance(t, StoredTensor) and t.dtype not in TORCH_DTYPES for t in (ours, theirs)):
        return None
    one, other = (t.detach() if isinstance(t, Tensor) else t.read() for t in (ours, theirs))
    if type(one) not in _PLAIN_TENSORS or type(other) not in _PLAIN_TENSORS:
        # Quantised on one side alone: codes and elements cannot be compared.
        return same_bits(one, other) if type(one) is type(other) else None
    if one.is_floating_point() != other.is_floating_point():
        return None
    try:
        wider = torch.promote_types(one.dtype, other.dtype)
    except RuntimeError:  # torch promotes neither float8 nor wide unsigned integers
        return None
    return same_bits(one.to(wider), other.to(wider))


_FLOATS = {"F64", "F32", "F16", "BF16"}
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
