"""Terms that the sublayers of a block add to its residual stream: found by the sum that they must give.

It replaces a list of families. A few tokens run, and of each block its input x, its output y and the outputs
of its modules are kept. The sublayers' are those terms t for which y = x + c Σt or y = c (x + Σt) holds with
one scalar c, element by element, to the rounding of the sum: in most c is 1, in Granite it is a residual
multiplier, in Gemma 4 the scale of a block. Where a norm follows a sublayer (Gemma 2, OLMo 2) the term is the
norm's output; where a module adds the residual itself (Bloom) it is what the module computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lazarus.engine.forms import Components, Form, Router, Spot, tensors_in
from lazarus.engine.pair import ModelPair
from lazarus.engine.probe import Conventions
from lazarus.engine.recorder import Recorder, RowSelection, first_tensor
from lazarus.errors import ShapeMismatchError, UnsupportedModelError
from lazarus.facts import ComponentName
from lazarus.messages import option
from lazarus.metrics import to_float64
from lazarus.models import LoadedModel
from lazarus.notes import Notes
from lazarus.tokens import listed

# Two sizes that tell the axes of a router's rows apart.
ROWS, LENGTH = 2, 7
KEPT_TOKENS = 4
"""So many tokens of each state are held against the sum."""
MOST_TERMS = 3
SMALLEST_FACTOR = 0.01

NO_SUM = (
    "a block's output is not its input plus what its sublayers give, as where a norm stands after that sum"
)

_NAMES: dict[str | None, ComponentName] = {"attn": "attn_out", "mlp": "mlp_out"}

SublayerOf = Callable[[nn.Module], str | None]
"""tells which sublayer a module belongs to: `attn`, `mlp` or `router`; None where that is not known"""


def with_components(
    pair: ModelPair, ids: tuple[Sequence[int], Sequence[int]], sublayers_of: tuple[SublayerOf, SublayerOf]
) -> ModelPair:
    """Return the pair with the components of both models' blocks, each found from a few of its own token ids.

    Raises:
        UnsupportedModelError: they cannot be found in one of the models.
        ShapeMismatchError: the two have none in common.
    """
    ours = learn_components(pair.base, pair.base_conventions, ids[0], sublayers_of[0])
    known = ours if pair.same_design else None
    theirs = learn_components(pair.finetuned, pair.finetuned_conventions, ids[1], sublayers_of[1], known)
    found = replace(
        pair,
        base_conventions=replace(pair.base_conventions, components=ours),
        finetuned_conventions=replace(pair.finetuned_conventions, components=theirs),
    )
    if not any(found.component_sites(layer) for layer in range(found.n_layers[0])):
        raise ShapeMismatchError(
            f"{option('sites', 'all')}: {pair.base.name} and {pair.finetuned.name} have residual streams of "
            f"{pair.widths[0]} and {pair.widths[1]} features, so nothing inside their blocks can be "
            f"compared. Leave {option('sites')} out.",
            option="sites",
        )
    return found


def note_components(pair: ModelPair, notes: Notes) -> None:
    """Note what is inside the blocks of the two models and is not compared."""
    compared = [{site.name for site in pair.component_sites(layer)} for layer in range(pair.n_layers[0])]
    left_out: dict[ComponentName, set[int]] = {}
    for model, forms in ((pair.base, pair.forms[0]), (pair.finetuned, pair.forms[1])):
        others = sorted({path for form in forms for path in form.others})
        if others:
            told = f"{model.name}: its blocks also add the output of {listed(others)}, which is not compared"
            notes.add("components-left-out", told, model=model.name)
        unseen = [layer for layer, form in enumerate(forms) if form.router and not form.router.picks]
        if unseen:
            told = f"{model.name}: which experts are picked cannot be seen, so the routers alone are compared"
            notes.add("components-left-out", told, model=model.name, layers=unseen)
        for layer, form in enumerate(forms):
            for name in set(form.names) - {"experts"} - compared[layer]:
                left_out.setdefault(name, set()).add(layer)
    for name, layers in sorted(left_out.items()):
        why = "where one model alone has it, or of another width"
        if pair.align == "text" and name == "router":
            why = f"with {option('align', 'text')}"
        notes.add("components-left-out", f"{name} is not compared {why}", layers=sorted(layers))


def learn_components(
    model: LoadedModel,
    conventions: Conventions,
    ids: Sequence[int],
    sublayer_of: SublayerOf,
    known: Components | None = None,
) -> Components:
    """Find what the sublayers of each block add, from a few token ids, and verify it on every block.

    `known` are the components of a model of the same design: they count where no state of a block is finite.

    Raises:
        UnsupportedModelError: a block is no such sum, or its sublayers cannot be told apart.
    """
    calls = _observe(model, conventions, ids, sublayer_of)
    kinds: dict[tuple[str, ...], list[_Call]] = {}
    for call in calls:
        paths = tuple(path for path, _ in model.anatomy.blocks[call.block].named_modules())
        kinds.setdefault(paths, []).append(call)
    forms: dict[int, Form] = {}
    for alike in kinds.values():
        seen = [call for call in alike if len(call.entered)]
        if not seen and known is not None:
            forms |= {call.block: known.of_blocks[call.block] for call in alike}
            continue
        if not seen:
            raise _refusal(model, "the states of a block are not finite")
        places = _terms(seen)
        if places is None:
            raise _refusal(model, NO_SUM)
        for call in alike:
            forms[call.block] = _form(model, call, places, sublayer_of)
    return Components(tuple(forms[i] for i in range(len(forms))), tuple(call.block for call in calls))


@dataclass
class _Call:
    """A call of a block: a few finite rows of what entered and left it, and of what its modules returned."""

    block: int
    entered: Float[Tensor, "tokens width"]
    left: Float[Tensor, "tokens width"]
    unit: float
    """the distance from 1 to the next larger number, in the narrowest dtype on the way"""
    outputs: dict[Spot, Float[Tensor, "tokens width"]] = field(default_factory=dict)
    routers: list[Router] = field(default_factory=list)


def _observe(
    model: LoadedModel, conventions: Conventions, ids: Sequence[int], sublayer_of: SublayerOf
) -> list[_Call]:
    """Run two short rows of tokens and take down every call of a block."""
    text = torch.tensor([ids[i % len(ids)] for i in range(LENGTH)])
    calls: list[_Call] = []
    with ExitStack() as stack:
        for index, block in enumerate(model.anatomy.blocks):
            watch = _Watch(index, block, conventions, sublayer_of, calls)
            stack.enter_context(watch.attached())
        batch = torch.stack([text, text.flip(0)])
        take = RowSelection(torch.Tensor.detach, torch.Tensor.detach)
        Recorder(model).run(batch, torch.ones_like(batch), take)
    return calls


@dataclass
class _Watch:
    """Looks at one block while it runs."""

    index: int
    block: nn.Module
    conventions: Conventions
    sublayer_of: SublayerOf
    calls: list[_Call]
    _seen: dict[Spot, Tensor] = field(default_factory=dict)
    _again: set[str] = field(default_factory=set)
    """modules that ran more than once: which of their outputs is a term cannot be told"""

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [
            module.register_forward_hook(self._hook(path), with_kwargs=True)
            for path, module in self.block.named_modules()
            # A module without weights, such as a dropout, belongs to no sublayer.
            if path and next(module.parameters(), None) is not None
        ]
        handles.append(self.block.register_forward_pre_hook(self._begin))
        handles.append(self.block.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if any(place.path == path for place in self._seen):
                self._again.add(path)
            for received, value in ((False, output), (True, (args, kwargs))):
                for index, tensor in enumerate(tensors_in(value)):
                    # A copy, because the block may add to it in place (Falcon).
                    self._seen[Spot(path, index, received)] = tensor.clone()

        return hook

    def _begin(self, *_: Any) -> None:
        # Blocks may share modules, and then another block's calls of them are seen as well.
        self._seen, self._again = {}, set()

    def _end(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x, y = args[0], first_tensor(output)
        seen = {place: tensor for place, tensor in self._seen.items() if place.path not in self._again}
        terms = {p: t for p, t in seen.items() if not p.received and self._is_state(t, x)}
        entered, left = self._few(x), self._few(y)
        finite = (entered + left).isfinite().all(-1)
        unit = max(torch.finfo(t.dtype).eps for t in (x, y, *terms.values()))
        rows = {place: self._few(t)[finite] for place, t in terms.items()}
        call = _Call(self.index, entered[finite], left[finite], unit, rows)
        call.routers = _routers(seen, self.block, self.sublayer_of) if self._is_batch_first(x) else []
        self.calls.append(call)

    def _is_batch_first(self, states: Tensor) -> bool:
        return self.conventions.axes == (0, 1) and states.dim() == 3

    def _is_state(self, tensor: Tensor, states: Tensor) -> bool:
        """Return whether a tensor is of the states' shape, or has all tokens in one axis."""
        flat = self._is_batch_first(states) and tensor.shape == states.flatten(0, 1).shape
        return tensor.is_floating_point() and (tensor.shape == states.shape or flat)

    def _few(self, states: Tensor) -> Tensor:
        return to_float64(self.conventions.by_token(states, LENGTH)[0, -KEPT_TOKENS:])


def _terms(calls: Sequence[_Call]) -> tuple[Spot, ...] | None:
    """Return the fewest outputs that add up in every call of blocks of one kind; None where none do."""
    common = [place for place in calls[0].outputs if all(place in call.outputs for call in calls)]
    # Of modules with one output (a dropout returns what it got) the outermost is taken.
    common.sort(key=lambda place: place.path.count("."))
    sets = (places for n in range(1, MOST_TERMS + 1) for places in combinations(common, n))
    return next((places for places in sets if all(_adds_up(call, places) for call in calls)), None)


def _adds_up(call: _Call, places: Sequence[Spot]) -> bool:
    terms = torch.stack([call.outputs[place] for place in places])
    x, y, total = call.entered, call.left, terms.sum(0)
    size = x.abs() + terms.abs().sum(0)
    # Each sum and product rounds by half a unit; there are as many of them as terms, and a few more.
    limit = (len(places) + 2) * call.unit
    whole, step = x + total, y - x
    if bool(((y - whole).abs() <= limit * size).all()):
        return True
    c = float((step * total).sum() / total.square().sum())
    # A block that adds next to nothing is no multiple of whatever its modules return.
    is_step = (step - c * total).abs() <= limit * (x.abs() + abs(c) * size)
    if abs(c) > SMALLEST_FACTOR and bool(is_step.all()):
        return True
    c = float((y * whole).sum() / whole.square().sum())
    return bool(((y - c * whole).abs() <= limit * abs(c) * size).all())


def _form(model: LoadedModel, call: _Call, places: Sequence[Spot], sublayer_of: SublayerOf) -> Form:
    block = model.anatomy.blocks[call.block]
    sublayer = {place: sublayer_of(block.get_submodule(place.path)) for place in places}
    found: dict[ComponentName, tuple[Spot, ...]] = {}
    for place, kind in sublayer.items():
        if kind in _NAMES:
            found[_NAMES[kind]] = (*found.get(_NAMES[kind], ()), place)
    if not found:
        raise _refusal(model, "no name of a module tells which is which")
    others = tuple(place.path for place in places if sublayer[place] not in _NAMES)
    return Form(found, call.routers[0] if call.routers else None, others)


def _routers(seen: Mapping[Spot, Tensor], block: nn.Module, sublayer_of: SublayerOf) -> list[Router]:
    """Return the routers of a block: modules that return scores, and the numbers of experts that they pick.

    Where there are none, the one that a name tells; then the MLP may hand the numbers to its experts.
    """
    by_module: dict[str, list[tuple[Spot, Tensor]]] = {}
    for place, tensor in seen.items():
        if tensor.shape[:1] == (ROWS * LENGTH,) or tensor.shape[:2] == (ROWS, LENGTH):
            by_module.setdefault(place.path, []).append((place, tensor))
    whole, by_name, handed = list[Router](), list[Router](), list[tuple[Spot, Tensor]]()
    for path, tensors in by_module.items():
        kind = sublayer_of(block.get_submodule(path))
        if kind == "attn":
            continue  # an attention may pick keys
        scores = [(p, t) for p, t in tensors if not p.received and t.is_floating_point()]
        numbers = [(p, t) for p, t in tensors if _are_numbers(t)]
        returned = next(((p, int(t.max())) for p, t in numbers if not p.received), None)
        if returned is not None:
            picks, highest = returned
            whole += [Router(p, t.shape[-1], picks) for p, t in scores if t.shape[-1] > highest][:1]
        elif kind == "router":
            # Weights are 0 for experts that are not picked, and scores are there for all.
            full = [(p, t.shape[-1]) for p, t in scores if bool(t.all())][:1]
            by_name += [Router(place, n_experts, _weights(scores, n_experts)) for place, n_experts in full]
        elif kind == "mlp":
            handed += numbers
    if whole or not by_name:
        return whole
    router = by_name[0]
    places = [place for place, tensor in handed if int(tensor.max()) < router.n_experts]
    return [replace(router, picks=router.picks or next(iter(places), None))]


def _weights(scores: Sequence[tuple[Spot, Tensor]], n_experts: int) -> Spot | None:
    """Return where a router gives as many weights that are not 0 for every token, and 0 for other experts."""
    for place, tensor in scores:
        n_picked = (tensor != 0).sum(-1)
        few = 0 < int(n_picked.min()) == int(n_picked.max()) < n_experts
        if few and tensor.shape[-1] == n_experts:
            return place
    return None


def _are_numbers(tensor: Tensor) -> bool:
    """Return whether a tensor may be the numbers of experts: several integers a token, and no token ids."""
    n_axes = 2 if tensor.shape[0] == ROWS * LENGTH else 3
    is_integer = tensor.dtype in (torch.int32, torch.int64)
    return is_integer and tensor.dim() == n_axes and bool((tensor >= 0).all())


def _refusal(model: LoadedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{option('sites', 'all')}: the attention and MLP outputs of {model.name} "
        f"({type(model.model).__name__}) cannot be found: {why}. Leave {option('sites')} out.",
        option="sites",
    )
