"""Where the states or logits of one text stop being finite, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from factories import save_model, tiny_llama
from lazarus.engine import Break, broken_weights, find_break, learn, note_of_weights
from lazarus.errors import BlocksNotFoundError
from lazarus.messages import in_flags
from lazarus.models import LoadedModel, LoadOptions, layout, load_paged, parse_model, wrap_model

IDS = [5, 17, 80, 3, 41, 9, 33, 12]
NAN, INF = float("nan"), float("inf")
DOWN = "mlp.down_proj.weight"


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_llama(num_hidden_layers=2).to(dtype)


def spoil(module: nn.Module, value: float, places: Sequence[int]) -> None:
    """Let a module return this value at these tokens, as part of the model."""

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, places] = value
        return output

    module.register_forward_hook(hook)


def broken(model: Any, **options: Any) -> Break | None:
    return find_break(wrap_model(model, "model"), IDS, 1, **options)


# --- The place


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("model.embed_tokens", Break("embedding", (2, 5), True)),
        ("model.norm", Break("final_norm", (2, 5), True)),
        ("model.layers.1", Break(1, (2, 5), True, in_wider="not finite")),
    ],
)
def test_weights_elsewhere_are_not_named_for_what_a_part_does(part: str, expected: Break) -> None:
    model = llama()
    spoil(model.get_submodule(part), NAN, (2, 5))
    with torch.no_grad():
        model.lm_head.weight[7] = NAN
        if part == "model.embed_tokens":
            model.model.layers[1].mlp.down_proj.weight[0, 0] = NAN
    assert broken(model) == expected


def test_all_broken_weights_are_named_where_one_is_at_the_break() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[3] = INF
        model.lm_head.weight[7] = NAN
    assert broken(model) == Break(
        "final_norm", tuple(range(8)), False, ("model.norm.weight", "lm_head.weight")
    )
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = NAN
        model.model.embed_tokens.weight[IDS[2]] = NAN
    names = ("model.embed_tokens.weight", f"model.layers.1.{DOWN}", "model.norm.weight", "lm_head.weight")
    assert broken(model) == Break("embedding", (2,), True, names)


def test_states_that_break_between_two_blocks_are_no_blocks_computation() -> None:
    model = llama()

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * NAN, *args[1:])

    model.model.layers[1].register_forward_pre_hook(hook)
    assert broken(model) == Break(1, tuple(range(8)), True, in_wider="unknown")


@pytest.mark.parametrize("by_name", [True, False])
def test_blocks_that_are_not_given_their_states_first(by_name: bool) -> None:
    """No common stream can be read from them, but a break is found as ever."""
    model = llama()
    plain = type(model.model.layers[0])

    class Other(plain):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], Tensor):  # as the model's own code calls it
                kwargs, args = (
                    (kwargs | {"hidden_states": args[0]}, ()) if by_name else (kwargs, ([args[0]],))
                )
            return super().__call__(*args, **kwargs)

        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states if by_name else hidden_states[0], **kwargs)

    for block in model.model.layers:
        block.__class__ = Other
    with pytest.raises(BlocksNotFoundError, match="carry no common residual stream"):
        learn(wrap_model(model, "model"), IDS, 2)
    assert broken(model) is None
    spoil(model.model.layers[1], INF, (2,))
    assert broken(model) == Break(1, (2,), False, in_wider="not finite")


# --- Logits


def logits_broken_at(tokens: Sequence[int], value: float) -> tuple[Any, list[int]]:
    """A model with one logit of this value at the states of these tokens, and the rows its head was given."""
    model, n_rows = llama(), list[int]()
    with torch.no_grad():
        rows = model.model(input_ids=torch.tensor([IDS])).last_hidden_state[0, list(tokens)]

    def hook(_module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        n_rows.append(args[0].shape[1])
        near = (args[0][0, :, None] - rows).abs().amax(-1).amin(-1) < 1e-4
        logits = logits.clone()
        logits[0, near, 7] = value
        return logits

    model.lm_head.register_forward_hook(hook)
    return model, n_rows


@pytest.mark.parametrize("value", [NAN, INF])
def test_logits_break_at_tokens(value: float) -> None:
    model, _ = logits_broken_at((0, 4, 6), value)
    found = broken(model, head_reads=BaseModelOutputWithPast)
    assert found == Break("logits", (0, 4, 6), has_nan=value != INF)
    assert broken(model) is None  # its states are finite


def test_a_token_that_cannot_come_is_no_break() -> None:
    model, _ = logits_broken_at((0, 4, 6), -INF)
    assert broken(model, head_reads=BaseModelOutputWithPast) is None


@pytest.mark.parametrize(("most", "n_rows", "tokens"), [(10, 1, (4,)), (900, 3, (4, 5))])
def test_few_logits_are_held_at_once(
    most: int, n_rows: int, tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazarus.engine.finite.MOST_LOGITS", most)
    model, seen = logits_broken_at((4, 5, 6), NAN)
    assert broken(model, head_reads=BaseModelOutputWithPast) == Break("logits", tokens, True)
    assert max(seen) == n_rows


def test_the_weights_of_a_head_are_named() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7] = NAN
    found = broken(model, head_reads=BaseModelOutputWithPast)
    assert found == Break("logits", tuple(range(8)), True, ("lm_head.weight",))


# --- The same block in a wider dtype


def overflowing(dtype: torch.dtype) -> Any:
    """A model whose block 1 is not finite in this dtype and is in any wider one."""
    model = llama(dtype)

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output * INF if output.dtype == dtype else output

    model.model.layers[1].mlp.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_narrow_dtype_is_found_to_be_the_reason(dtype: torch.dtype) -> None:
    found = broken(overflowing(dtype))
    assert found is not None
    assert (found.site, found.in_wider) == (1, "finite")


class Packed(nn.Parameter):
    """A quantised weight, which a cast does not make another computation of."""


def with_codes(model: Any) -> None:
    model.model.layers[1].codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)


def with_packed_weights(model: Any) -> None:
    model.model.layers[1].packed = Packed(torch.zeros(2, dtype=torch.float16))


def raising(error: type[Exception]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        mlp = model.model.layers[1].mlp
        plain = mlp.forward

        def forward(states: Tensor) -> Tensor:
            if states.dtype != torch.float16:
                raise error
            return plain(states)  # type: ignore[no-any-return]

        mlp.forward = forward

    return change


@pytest.mark.parametrize(
    "change", [with_codes, with_packed_weights, raising(RuntimeError), raising(MemoryError)]
)
def test_a_block_that_cannot_run_in_a_wider_dtype_says_nothing(change: Callable[[Any], None]) -> None:
    model = overflowing(torch.float16)
    change(model)
    found = broken(model)
    assert found is not None
    assert (found.site, found.in_wider) == (1, "unknown")


def test_there_is_none_wider_than_float64() -> None:
    found = broken(overflowing(torch.float64))
    assert found is not None
    assert (found.site, found.in_wider) == (1, "unknown")


def test_a_slip_of_ours_in_a_wider_dtype_passes_as_it_is() -> None:
    """The function runs as if it were written in a module of ours."""
    model = overflowing(torch.float16)
    mlp = model.model.layers[1].mlp
    names: dict[str, Any] = {"__name__": "lazarus.engine.made_up", "plain": mlp.forward, "narrow": torch.half}
    exec(
        "def forward(states):\n"
        "    if states.dtype != narrow:\n"
        "        raise RuntimeError('a slip')\n"
        "    return plain(states)\n",
        names,
    )
    mlp.forward = names["forward"]
    with pytest.raises(RuntimeError, match="a slip"):
        broken(model)


# --- Weights


def test_the_weights_of_some_modules_alone() -> None:
    model = wrap_model(llama(), "model")
    blocks = model.anatomy.blocks
    with torch.no_grad():
        for block in blocks:
            block.get_parameter(DOWN)[0, 0] = NAN
    assert broken_weights(model, [blocks[1]]) == [f"model.layers.1.{DOWN}"]
    assert broken_weights(model) == [f"model.layers.{i}.{DOWN}" for i in (0, 1)]


def test_a_model_that_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SMALL_BYTES", 0)
    plain, name = llama(), f"model.layers.1.{DOWN}"
    with torch.no_grad():
        plain.get_parameter(name)[0, 0] = NAN
    reference = parse_model(str(save_model(tmp_path / "model", plain)))
    options = LoadOptions(torch.float32, torch.device("cpu"))
    model, _ = load_paged(reference, reference, options, lambda _role, _name: None)
    assert broken_weights(model) == []  # none was read yet
    assert find_break(model, IDS, 1) == Break(1, tuple(range(8)), True, (name,))
    assert all(p.is_meta for block in model.anatomy.blocks for p in block.parameters())
    assert broken_weights(model) == [name]
    assert broken_weights(model, [model.anatomy.stack.get_submodule("norm")]) == []
    # Rows of an embedding that no text has read are memory that was never written to.
    with torch.no_grad():
        model.model.get_input_embeddings().weight[250:] = NAN
    assert broken_weights(model) == [name]


# --- The words


@pytest.mark.parametrize(
    ("found", "dtype", "expected"),
    [
        (
            Break("embedding", (1,), False),
            torch.float16,
            "its states overflow float16 from the embedding on: load it in bfloat16 or float32",
        ),
        (
            Break("final_norm", (1,), False),
            torch.float16,
            "its states overflow float16 after the final norm: load it in bfloat16 or float32",
        ),
        (
            Break("logits", (1,), False),
            torch.float16,
            "its logits overflow float16: load it in bfloat16 or float32",
        ),
        (
            Break(1, (1,), True, in_wider="finite"),
            torch.float16,
            "its states overflow float16 from layer 1 on: load it in bfloat16 or float32",
        ),
        (
            Break(1, (1,), True),
            torch.float16,
            "its states are not finite from layer 1 on, and no weight was seen to hold NaN or infinity: if "
            "float16 is too narrow, float32 mends it (load it in float32)",
        ),
        (
            Break("logits", (1,), False),
            torch.bfloat16,
            "its logits are not finite though its states are, on prompt 3, and no weight was seen to hold "
            "NaN or infinity: if bfloat16 is too narrow, float32 mends it (load it in float32)",
        ),
        (
            Break(1, (1,), False, in_wider="finite"),
            torch.bfloat16,
            "its states are finite in float32 and not in bfloat16 from layer 1 on: load it in float32",
        ),
        (
            Break(1, (1,), False, in_wider="finite"),
            torch.float32,
            "its states overflow float32 from layer 1 on, though all weights there are finite: no wider "
            "dtype is at hand, so use another checkpoint",
        ),
        (
            Break(1, (1, 2), True, in_wider="not finite"),
            torch.float32,
            "layer 1 makes NaN of finite states, though all its weights are finite, at tokens 1, 2 of "
            "prompt 3; it does so in a wider dtype too, so its computation is at fault",
        ),
        (
            Break(1, (1, 2), False, in_wider="not finite"),
            torch.float16,
            "layer 1 makes infinity of finite states, though all its weights are finite, at tokens 1, 2 of "
            "prompt 3; it does so in a wider dtype too, so its computation is at fault",
        ),
        *[
            (
                Break("final_norm", (1,), False),
                dtype,
                "its states are not finite after the final norm, and no weight was seen to hold NaN or "
                f"infinity: its numbers are too large for {name}, so use another checkpoint",
            )
            for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64"))
        ],
    ],
)
def test_what_is_told_of_a_break(found: Break, dtype: torch.dtype, expected: str) -> None:
    model = wrap_model(llama(dtype), "model")
    expected = f"model: {expected}"
    assert found.told(model, "prompt 3") == expected
    note = found.note(model, "prompt 3")
    assert (note.code, note.text, note.model) == ("not-finite", expected, "model")
    assert note.layers == ((1,) if found.site == 1 else ())


@pytest.mark.parametrize(
    ("kind", "settings", "remedy"),
    [
        ("loaded", None, "load it in bfloat16 or float32"),
        ("folder", None, "run with --dtype bfloat16 or --dtype float32"),
        (
            "folder",
            {"quant_method": "fp8"},
            "it is quantised and keeps its dtype, so use an unquantised checkpoint in bfloat16 or float32",
        ),
    ],
)
def test_what_helps_depends_on_where_the_model_is_from(kind: Any, settings: Any, remedy: str) -> None:
    model = replace(wrap_model(llama(torch.float16), "model"), kind=kind)
    if settings:
        model.model.config.quantization_config = settings
    told = in_flags(Break("logits", (1,), False).told(model))
    assert told == f"model: its logits overflow float16: {remedy}"


UP = "model.layers.0.mlp.up_proj.weight"
AGAIN = "hold NaN or infinity, first {}: fetch or train that model again"
WIDER = "overflow float16, first {}, and are stored in {}: load it in bfloat16 or float32"


@pytest.mark.parametrize(
    ("stored", "names", "expected"),
    [
        ("float32", [UP], f"1 weights {WIDER.format(UP, 'float32')}"),
        ("F32", [UP], f"1 weights {WIDER.format(UP, 'F32')}"),
        ("float16", [UP], f"1 weights {AGAIN.format(UP)}"),
        ("F16", [UP], f"1 weights {AGAIN.format(UP)}"),
        (None, [UP], f"1 weights {AGAIN.format(UP)}"),
        # NaN was there before, whichever of them holds it.
        ("float32", [UP, f"model.layers.1.{DOWN}"], f"2 weights {AGAIN.format(UP)}"),
        # Another name of a tied weight is none of the model's parameters.
        ("float32", ["tied.weight", UP], f"2 weights {WIDER.format('tied.weight', 'float32')}"),
    ],
)
def test_weights_may_overflow_by_their_dtype_alone(
    stored: str | None, names: list[str], expected: str
) -> None:
    model: LoadedModel = replace(wrap_model(llama(torch.float16), "model"), stored_dtype=stored)
    with torch.no_grad():
        model.model.get_parameter(UP)[0, 0] = INF
        model.model.get_parameter(f"model.layers.1.{DOWN}")[0, 0] = NAN
    note = note_of_weights(model, names)
    assert (note.code, note.text, note.model) == ("broken-weights", f"model: {expected}", "model")


def test_weights_that_are_not_stored_in_float16_but_run_in_another_type() -> None:
    model = wrap_model(llama(), "model")
    assert note_of_weights(model, [UP]).text == f"model: 1 weights {AGAIN.format(UP)}"
