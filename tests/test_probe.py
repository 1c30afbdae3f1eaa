"""What the probe learns of models with one odd property each, made of a tiny Llama."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutput

from architectures import build
from factories import tiny_llama
from lazarus.engine import Conventions, Head, head_reads_blocks, learn
from lazarus.engine.probe import _last_of_new_kind, _other_pass_limit, _same_pass_limit
from lazarus.errors import BlocksNotFoundError
from lazarus.models import wrap_model

IDS = [5, 17, 80, 3, 41, 9, 33, 12]
Change = Callable[[Tensor], Tensor]


def learnt(model: Any) -> Conventions:
    return learn(wrap_model(model, "model"), IDS, 2)


def reads_blocks(model: Any) -> bool | None:
    return head_reads_blocks(wrap_model(model, "model"), IDS, 2)


# --- The axes of the states


def rearranged(model: Any, there: Change, back: Change) -> Any:
    """Let states have another arrangement between the blocks of a model: the one that `there` gives them."""

    def moved(plain: Any) -> Any:
        return lambda states, *args, **kwargs: there(plain(back(states), *args, **kwargs))

    for block in model.model.layers:
        block.forward = moved(block.forward)
    model.model.layers[0].register_forward_pre_hook(lambda _block, args: (there(args[0]), *args[1:]))
    model.model.norm.register_forward_pre_hook(lambda _norm, args: back(args[0]))
    return model


def test_tokens_may_come_before_prompts() -> None:
    def turned(states: Tensor) -> Tensor:
        return states.transpose(0, 1)

    model = rearranged(tiny_llama(), turned, turned)
    known = learnt(model)
    assert known == replace(learnt(tiny_llama()), axes=(1, 0))
    states = torch.randn(2, 5, 32)
    assert torch.equal(known.rows(turned(states)), states)
    assert reads_blocks(model) is False  # rows are handed to the head as the tokens of one prompt


def test_parallel_streams_are_one_wide_state_that_is_joined_at_the_end() -> None:
    model = tiny_llama()
    model.model.norm = nn.Identity()
    known = learnt(rearranged(model, lambda s: torch.stack([s, 2 * s], 2), lambda s: s[:, :, 0]))
    assert (known.axes, known.width, known.causal, known.padding) == ((0, 1), 64, True, "right")
    assert known.has_final_norm
    assert [(note.code, note.model) for note in known.notes] == [("parallel-streams", "model")]
    states = torch.randn(2, 5, 32)
    assert torch.equal(known.rows(torch.stack([states, 2 * states], 2)), torch.cat([states, 2 * states], -1))


@pytest.mark.parametrize("turn", [False, True])
def test_states_without_an_axis_of_features_are_refused(turn: bool) -> None:
    def there(states: Tensor) -> Tensor:
        means = states.mean(-1)
        return means.T if turn else means

    def back(means: Tensor) -> Tensor:
        rows = means.T if turn else means
        return rows[..., None].expand(*rows.shape, 32)

    with pytest.raises(BlocksNotFoundError, match="no place for each token"):
        learnt(rearranged(tiny_llama(), there, back))


# --- The blocks


def test_a_model_may_have_one_block() -> None:
    plain = learnt(tiny_llama())
    model = tiny_llama(num_hidden_layers=1)
    assert learnt(model) == replace(plain, n_layers=1)
    assert reads_blocks(model) is True


class Twice(nn.ModuleList):
    """Blocks that run one after the other, and then all of them again."""

    def __iter__(self) -> Iterator[nn.Module]:
        yield from super().__iter__()
        yield from super().__iter__()


def test_a_block_that_runs_again_is_a_layer_each_time() -> None:
    model = tiny_llama()
    wrapped = wrap_model(model, "model")
    model.model.layers = Twice(model.model.layers)
    known = learn(wrapped, IDS, 2)
    assert known.n_layers == 8
    assert [(note.code, note.model) for note in known.notes] == [("repeated-blocks", "model")]


class Half(nn.ModuleList):
    """Blocks of which the second half never runs."""

    def __iter__(self) -> Iterator[nn.Module]:
        yield from list(super().__iter__())[: len(self) // 2]


def test_a_block_that_does_not_run_is_refused_with_the_option_that_helps() -> None:
    model = tiny_llama()
    wrapped = wrap_model(model, "model")
    model.model.layers = Half(model.model.layers)
    with pytest.raises(BlocksNotFoundError, match="block 2 of 4 did not run") as refusal:
        learn(wrapped, IDS, 2)
    assert refusal.value.option == "layers_path"


def test_a_stream_that_changes_its_width_is_refused_with_the_option_that_helps() -> None:
    model: Any = tiny_llama()
    first, second = model.model.layers[:2]
    first.register_forward_hook(lambda _block, _args, output: torch.cat([output, output], -1))
    second.register_forward_pre_hook(lambda _block, args: (args[0][..., :32], *args[1:]))
    with pytest.raises(BlocksNotFoundError, match="do not have one shape") as refusal:
        learnt(model)
    assert refusal.value.option == "layers_path"


def test_a_cast_after_the_last_block_is_something_done_to_its_states() -> None:
    model: Any = tiny_llama()
    model.model.norm = nn.Identity()
    assert not learnt(model).has_final_norm
    model.model.norm.forward = Tensor.double
    model.lm_head.double()
    assert learnt(model).has_final_norm


def nan_in_one_feature(output: Tensor) -> Tensor:
    return torch.cat([output[..., :-1], output[..., -1:] * float("nan")], -1)


def nan_everywhere(output: Tensor) -> Tensor:
    return output * float("nan")


@pytest.mark.parametrize("broken", [nan_in_one_feature, nan_everywhere])
def test_a_final_norm_is_told_from_none_though_states_are_not_finite(broken: Change) -> None:
    model: Any = tiny_llama()
    model.model.layers[-1].register_forward_hook(lambda _block, _args, output: broken(output))
    assert learnt(model).has_final_norm
    model.model.norm = nn.Identity()
    assert not learnt(model).has_final_norm
    model.model.norm.forward = torch.nan_to_num
    assert learnt(model).has_final_norm
    if broken is nan_in_one_feature:
        model.model.norm.forward = torch.clone
        assert not learnt(model).has_final_norm


def test_what_is_learnt_is_how_the_stack_runs_by_itself() -> None:
    """In this model alone, the module around the stack lets tokens see those after them."""
    model: Any = build("gemma3")
    expected, plain = learnt(model), model.model.forward

    def seeing_ahead(*args: Any, **kwargs: Any) -> Any:
        block = model.model.language_model.layers[0]
        handle = block.register_forward_pre_hook(
            lambda _block, args: (args[0] + args[0].roll(-1, 1), *args[1:])
        )
        try:
            return plain(*args, **kwargs)
        finally:
            handle.remove()

    model.model.forward = seeing_ahead
    assert expected.causal
    assert learnt(model) == expected


# --- What a token's states depend on: later tokens, padding, other prompts


def tiny_bert() -> Any:
    """A model that looks ahead."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    return BertModel(BertConfig(vocab_size=100, num_attention_heads=4, **sizes)).eval()


@pytest.mark.parametrize(
    "ids", [[9, 4, 8, 6, 7, 5, 9], [9, 4, 8, 6, 7, 5, 4], [9, 4, 8, 6, 7, 5, 5], [9, 5], [99], [1], [0]]
)
def test_a_look_ahead_is_seen_on_any_tokens(ids: list[int]) -> None:
    known = learn(wrap_model(tiny_bert(), "model"), ids, 2)
    assert (known.causal, known.padding) == (False, "right")


def test_padding_may_be_told_by_its_token() -> None:
    model = tiny_bert()
    plain = model.forward
    model.forward = lambda **given: plain(**{**given, "attention_mask": given["input_ids"] != 2})
    known = learnt(model)
    assert (known.causal, known.padding) == (False, "right")


def changing(model: Any, index: int, change: Change) -> Any:
    """Let a block give other states, as one of a kind of its own."""
    block = model.model.layers[index]
    plain = block.forward
    block.forward = lambda *args, **kwargs: change(plain(*args, **kwargs))
    return model


@pytest.mark.parametrize("index", [0, 2])
def test_prompts_run_with_those_of_their_length_where_padding_changes_them(index: int) -> None:
    known = learnt(changing(tiny_llama(), index, lambda states: states + states.mean(1, keepdim=True)))
    assert (known.causal, known.padding, known.padding_is_known) == (False, "equal_lengths", True)


@pytest.mark.parametrize("index", [0, 2])
def test_prompts_run_alone_where_any_other_changes_them(index: int) -> None:
    known = learnt(changing(tiny_llama(), index, lambda states: states + states.mean(0)))
    assert (known.padding, known.padding_is_known) == ("one_by_one", True)


def test_a_token_that_padding_makes_nan_is_changed_though_no_other_is() -> None:
    def spoilt(states: Tensor) -> Tensor:
        if len(states) == 3:
            states[2, 0] = float("nan")
        return states

    known = learnt(changing(tiny_llama(), 3, spoilt))
    assert (known.padding, known.padding_is_known) == ("equal_lengths", True)


def test_states_are_the_same_to_a_few_roundings_and_at_least_to_a_small_part() -> None:
    limits = {
        torch.float32: (1e-4, 1e-3),
        torch.float16: (2**-8, 2**-5),
        torch.bfloat16: (2**-5, 2**-2),
    }
    for dtype, expected in limits.items():
        states = torch.ones(1, dtype=dtype)
        assert (_same_pass_limit(states), _other_pass_limit(states)) == expected


Settings = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ([{}, {}, {}], 0),
        ([{"layer_number": 0}, {"layer_number": 1}, {"layer_number": 2}], 0),
        ([{"block_idx": 0}, {"block_idx": 1}, {"block_idx": 2}], 0),
        ([{"layer_norm": True}, {"layer_norm": True}, {"layer_norm": True}], 0),
        ([{"layer_norm": False}, {"layer_norm": True}], 1),
        ([{"layer_kind": 7}, {"layer_kind": 8}, {"layer_kind": 7}], 1),
        ([{"window": 0}, {"window": 1}, {"window": 2}], 2),
        ([{"activation": "gelu"}, {"activation": "gelu"}, {"activation": "relu"}], 2),
        ([{"scale": 0.5}, {"scale": None}, {"scale": 0.5}], 1),
        ([{}, {"forward": torch.relu}, {"forward": torch.relu}], 1),
    ],
)
def test_blocks_are_of_one_kind_with_the_same_settings_less_their_numbers(
    settings: Settings, last: int
) -> None:
    """The numbers of a block's own are those of its place, under a name that says so."""
    blocks = [nn.Linear(2, 2) for _ in settings]
    for block, attributes in zip(blocks, settings, strict=True):
        vars(block).update(attributes)
    assert _last_of_new_kind(blocks) is blocks[last]


# --- The head


def head_in_the_stack() -> Any:
    """A stack that has its own LM head inside it."""
    whole = tiny_llama()
    stack, plain = whole.model, whole.model.forward

    def forward(**given: Any) -> Any:
        output = plain(**given)
        output.logits = whole.lm_head(output.last_hidden_state)
        return output

    stack.forward = forward
    stack.get_output_embeddings = lambda: whole.lm_head
    return stack


def no_logits() -> Any:
    model: Any = tiny_llama()
    plain = model.forward
    model.forward = lambda **given: BaseModelOutputWithPast(last_hidden_state=plain(**given).logits)
    return model


def plain_states() -> Any:
    """A model whose stack returns a tuple of its states."""
    model: Any = tiny_llama()
    plain = model.model.forward
    model.model.forward = lambda **given: (plain(**given).last_hidden_state,)
    model.forward = lambda **given: CausalLMOutput(logits=model.lm_head(model.model(**given)[0]))
    return model


class Routed(BaseModelOutputWithPast):  # type: ignore[misc]  # transformers has no types
    """An output that cannot be made of states alone."""

    def __init__(self, *, routes: Tensor, **others: Any) -> None:
        super().__init__(**others)
        self.routes = routes


def more_than_states() -> Any:
    model: Any = tiny_llama()
    plain = model.model.forward
    model.model.forward = lambda **given: Routed(routes=torch.zeros(1), **plain(**given))
    return model


def no_head() -> Any:
    return tiny_llama().model


@pytest.mark.parametrize("make", [head_in_the_stack, no_logits, plain_states, more_than_states, no_head])
def test_a_model_is_known_though_its_head_cannot_be_run_by_itself(make: Callable[[], Any]) -> None:
    assert learnt(make()) == replace(learnt(tiny_llama()), head_reads=None)


def test_a_model_without_a_head_has_none_that_reads_blocks() -> None:
    assert reads_blocks(no_head()) is False


def test_a_head_is_tried_on_random_states_where_its_model_gives_nothing_finite() -> None:
    model: Any = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    assert reads_blocks(model) is True


def test_an_end_that_reads_an_earlier_block_too_is_found_out() -> None:
    model: Any = tiny_llama()
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda _block, _args, output: seen.append(output))
    model.model.norm.register_forward_pre_hook(lambda _norm, args: args[0] + seen[-1])
    assert reads_blocks(model) is False


def test_an_end_that_fails_on_other_states_is_found_out() -> None:
    def refuse(_norm: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) == 1:
            raise ValueError("one prompt is too few")

    model: Any = tiny_llama()
    model.model.norm.register_forward_pre_hook(refuse)
    assert reads_blocks(model) is False


def test_a_block_may_run_twice_without_extending_a_cache_twice() -> None:
    def twice(plain: Any) -> Any:
        return lambda states, *args, **kwargs: plain(plain(states, *args, **kwargs), *args, **kwargs)

    # Eager attention holds the keys against the mask.
    model: Any = tiny_llama(attn_implementation="eager")
    for block in model.model.layers:
        block.forward = twice(block.forward)
    assert learnt(model) == learnt(tiny_llama())
    assert reads_blocks(model) is True


def test_a_head_runs_where_its_states_are() -> None:
    """Not on torch's default device."""
    model, places = tiny_llama(), list[torch.device]()
    head = Head(wrap_model(model, "model"), BaseModelOutputWithPast)

    def note(_model: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        places.append(given["input_ids"].device)

    model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.device("meta"):
        head.read(torch.ones(3, 32, device="cpu"))
    assert places == [torch.device("cpu")]


def test_a_forward_pass_that_was_put_on_the_stack_is_still_there() -> None:
    """As accelerate puts one there."""
    model: Any = tiny_llama()
    plain = model.model.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    model.model.forward = own
    assert learnt(model).head_reads is not None
    assert model.model.forward is own
