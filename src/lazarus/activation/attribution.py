"""Who caused the change of the output: each parameter's part of KL(base‖fine-tuned), in nats that add up.

The Aumann–Shapley value along the straight path from base's weights θ to the fine-tuned ones, θ + Δ:
A = ∫₀¹ ⟨∇KL(base‖θ + tΔ), Δ⟩ dt, of which the sum over all parameters is KL(base‖fine-tuned) (Aumann &
Shapley 1974, Values of Non-Atomic Games; integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from lazarus.activation.attributed import Attributed, Floats, Group
from lazarus.activation.runplan import RunPlan
from lazarus.batches import TokenBatch, make_batches
from lazarus.engine import NO_HEAD, Asked, Contributions, ModelPair, Path, PathRunner, check_path
from lazarus.errors import UnsupportedModelError
from lazarus.messages import option
from lazarus.names.components import Namer, Place
from lazarus.options import Options

POINTS = (4, 8, 16)
"""The numbers of points of the quadrature that are tried, until the error is small enough. One is base."""
MOST_LOGITS = 2**25
"""The logits of base that are held at once, beyond those of one batch."""
N_RESTORED = (1, 3)
"""how many of the groups with the largest parts are set back to base, to see what that gives"""


@runtime_checkable
class Observer(Protocol):
    """An object that is told how far an attribution has come."""

    def running(self, n_tokens: int) -> None:
        """The passes begin: so many tokens in all."""

    def advanced(self, n_tokens: int) -> None:
        """Count so many more tokens."""


def attribute(
    pair: ModelPair, plan: RunPlan, options: Options, watcher: Observer, kl: Floats | None = None
) -> Attributed | None:
    """Attribute the change of the output to the parameters that changed.

    `kl` is KL(base‖fine-tuned) of each prompt in float32, where it is known. None where that is infinite or
    not a number for a prompt: there is nothing finite to add up to.

    Raises:
        AdapterError: it is not known what an adapter adds to a weight.
        UnsupportedModelError: there is no path of weights between the two, or no gradient along it.
    """
    head_reads = pair.base_conventions.head_reads
    assert head_reads is not None
    path = Path(pair.base, pair.finetuned, options.layers_path)
    job = _Job(pair, plan, PathRunner(path, head_reads, plan.position), watcher)
    groups = list(_tensors(path) if options.attribute == "tensors" else _blocks(path))
    if not path.changes:
        n_prompts = len(plan.base_prompts)
        return Attributed(np.zeros((0, n_prompts)), np.zeros(n_prompts), POINTS[0], [])
    kl = job.measure_kl() if kl is None else kl
    if not np.isfinite(kl).all():
        return None
    for n_points in POINTS:
        found = Attributed(job.integrate(n_points), kl, n_points, groups)
        if not found.is_rough:
            break
    return replace(found, restored=job.restore(found))


def check_attribution(pair: ModelPair) -> None:
    """Refuse a pair whose change cannot be attributed, before anything runs.

    Raises:
        UnsupportedModelError: the message says why.
    """
    why = None
    if pair.base.pager is not None:
        why = f"needs both models in memory: use {option('memory', 'resident')}"
    elif pair.align != "ids":
        why = f"needs the same tokens for both models, and {option('align')} is {pair.align}"
    elif not pair.shares_vocabulary:
        reasons = (pair.base_conventions.why_no_head, pair.finetuned_conventions.why_no_head)
        why = f"needs next-token logits: {next(filter(None, reasons), NO_HEAD)}"
    if why is not None:
        raise UnsupportedModelError(f"{option('attribute')} {why}.", option="attribute")
    check_path(pair.base, pair.finetuned)


@dataclass
class _Job:
    """The work of an attribution: the prompts, and what runs them."""

    pair: ModelPair
    plan: RunPlan
    runner: PathRunner
    watcher: Observer
    all_asked: list[Asked] = field(default_factory=list)
    """every batch with base's logits, where there was room for all at once"""

    @property
    def n_prompts(self) -> int:
        """The number of prompts, repeats among them."""
        return len(self.plan.base_prompts)

    @property
    def sample(self) -> TokenBatch:
        """Return a few short prompts, on which it is learnt how the parts are told apart."""
        distinct = [self.plan.base_prompts[i] for i in self.plan.repeats.distinct]
        prompts = sorted(distinct, key=lambda prompt: len(prompt.ids))
        padding = self.pair.padding(self.plan.longest)
        n_prompts = 2 if padding == "right" else 1
        return TokenBatch(prompts[:n_prompts], self.plan.pad_ids[0])

    @cached_property
    def contributions(self) -> Contributions:
        """Return what adds up the parts, once it is known how."""
        return self.runner.learn(self.sample)

    @cached_property
    def batches(self) -> list[TokenBatch]:
        """Return every distinct prompt once; one by one where parts cannot be told apart in a batch."""
        plan = self.plan
        distinct = [plan.base_prompts[i] for i in plan.repeats.distinct]
        padding = "one_by_one" if self.contributions.one_by_one else self.pair.padding(plan.longest)
        # Half as many tokens as in the run: a backward pass needs the states of all blocks at once.
        return make_batches(distinct, max(1, plan.batch_tokens // 2), padding, plan.pad_ids[0])

    def measure_kl(self) -> Floats:
        """Return KL(base‖fine-tuned) of each prompt."""
        kl = np.zeros(self.n_prompts)
        for asked in self._asked():
            self.runner.path.move(1.0)
            for each in asked:
                kl[each.batch.prompts] = self.runner.kl(each)
        return self._spread(kl)

    def integrate(self, n_points: int) -> Floats:
        """Return every parameter's part in each prompt's KL: [changes, prompts]."""
        parts = np.zeros((len(self.runner.path.changes), self.n_prompts))
        points = points_beside_base(n_points)
        self.watcher.running(len(points) * sum(batch.n_tokens for batch in self.batches))
        for asked in self._asked():
            for alpha, weight in points:
                self.runner.path.move(alpha)
                for each in asked:
                    self.runner.add_up(each, self.contributions)
                    parts[:, each.batch.prompts] += weight * self.contributions.found.numpy()
                    self.watcher.advanced(each.batch.n_tokens)
        return self._spread(parts)

    def _asked(self) -> Iterator[list[Asked]]:
        """Run base on the batches, so many at a time that there is room for its logits; all are kept."""
        if self.all_asked:
            yield self.all_asked
            return
        asked: list[Asked] = []
        batches = self.batches  # learning how to make them moves the path
        self.runner.path.move(0.0)
        for n_done, batch in enumerate(batches, start=1):
            asked.append(self.runner.ask(batch))
            if n_done < len(batches) and sum(each.logits.numel() for each in asked) > MOST_LOGITS:
                yield asked
                asked = []
                self.runner.path.move(0.0)
        if len(asked) == len(batches):
            self.all_asked = asked
        yield asked

    def restore(self, found: Attributed) -> list[tuple[tuple[str, ...], float]]:
        """Set the groups with the largest parts back to base, and return the KL that is left."""
        ranked = sorted(found.groups, key=lambda group: -float(found.of_group(group).mean()))
        chosen = [ranked[:n] for n in N_RESTORED if n <= len(ranked)]
        left = np.zeros((len(chosen), self.n_prompts))
        for asked in self._asked():
            for row, groups in enumerate(chosen):
                self.runner.path.move(1.0, {i for group in groups for i in group.changes})
                for each in asked:
                    left[row, each.batch.prompts] = self.runner.kl(each)
        means = self._spread(left).mean(-1).tolist()
        return [(tuple(g.name for g in groups), kl) for groups, kl in zip(chosen, means, strict=True)]

    def _spread(self, values: Floats) -> Floats:
        """Give prompts that repeat others what these have."""
        for prompt, others in self.plan.repeats.others.items():
            values[..., list(others)] = values[..., [prompt]]
        return values


def points_beside_base(n_points: int) -> list[tuple[float, float]]:
    """Return where the integrand is found, in (0, 1), and the weights, of a Gauss–Radau quadrature.

    One of the points is base, where KL(base‖here) is least and the integrand f is 0, so it need not run. With
    f(t) = t h(t) the others are those of ∫₀¹ t h(t) dt, a Gauss–Jacobi quadrature: of n points in all it is
    exact for polynomials f up to degree 2n − 2.
    """
    from scipy.special import roots_jacobi

    nodes, weights = roots_jacobi(n_points - 1, 0, 1)
    at = (nodes + 1) / 2  # from [−1, 1] to [0, 1]
    return list(zip(at.tolist(), (weights / (4 * at)).tolist(), strict=True))


def _blocks(path: Path) -> Iterator[Group]:
    """Yield the groups of a path: a block each, the embedding, the head, and what else there is."""
    model, places = path.model.model, _places(path)
    ends = (("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings()))
    tables = {name: getattr(module, "weight", None) for name, module in ends}
    found: dict[tuple[int | None, str], list[int]] = {}
    for index, (change, place) in enumerate(zip(path.changes, places, strict=True)):
        at = " and ".join(name for name, weight in tables.items() if weight is change.parameter)
        name = at or place.component if place.layer is None else f"block {place.layer}"
        found.setdefault((place.layer, name), []).append(index)
    # Blocks in order, and then the others as they come.
    for layer, name in sorted(found, key=lambda key: (key[0] is None, key[0] or 0)):
        yield Group(name, layer, tuple(found[layer, name]))


def _tensors(path: Path) -> Iterator[Group]:
    """Yield a group for each changed parameter."""
    places = _places(path)
    order = sorted(range(len(places)), key=lambda i: (places[i].layer is None, places[i].layer or 0))
    for index in order:
        change, place = path.changes[index], places[index]
        yield Group(" and ".join(change.names), place.layer, (index,), place.component)


def _places(path: Path) -> list[Place]:
    namer = Namer(path.model.model, path.model.anatomy)
    return [namer.place(change.names[0]) for change in path.changes]
