"""Files that were changed as a stranger might: trees of JSON with odd values, bytes, lengths, texts."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30,
    -(2**63), 0.0, -0.5, 1e308, 1e-320,
    float("nan"), float("inf"), "", "x", "0", "-1", "..", "../x", "/dev/null", "/", "~", "\0",
    "\u202e", "\x1b[2J",
    "\ud800", "e\u0301", "a" * 5000, "(" * 50, "(([a-z])+.)+[A-Z]([a-z])+$", "%s%n",
    "{{ 1/0 }}", "{% raw %}",
    "{% for i in range(9) %}{{ i }}{% endfor %}", "__class__", "torch.nn.Linear", "nan", "1e999", "float32",
    [], {}, [[]], [None], [0], [-1], [1, 2], ["x"], {"": ""}, {"a": {"b": []}}, [[1, 2], [3]], {"0": 1},
)  # fmt: skip
"""values that a reader may not have thought of"""
WHOLE = struct.Struct("<Q")
LENGTHS = (0, 1, 7, 8, 255, 2**16, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, kind: str, dice: random.Random) -> bytes:
    """Return a file of a kind, changed in one to four places."""
    change = KINDS[kind]
    for _ in range(dice.choice((1, 1, 1, 2, 2, 4))):
        data = change(data, dice)
    return data


# --- JSON ---------------------------------------------------------------------------------------


def of_json(data: bytes, dice: random.Random) -> bytes:
    """A tree with one value, key or list changed; now and then its bytes."""
    if dice.random() < 0.15:
        return of_bytes(data, dice) if dice.random() < 0.9 else b"[" * dice.choice((1000, 200_000))
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return of_bytes(data, dice)
    return json.dumps(changed_tree(tree, dice)).encode("utf-8", "surrogatepass")


def of_lines(data: bytes, dice: random.Random) -> bytes:
    """JSON Lines: one line is changed, lost or there twice."""
    lines = data.splitlines()
    if not lines or dice.random() < 0.2:
        return of_text(data, dice)
    place = dice.randrange(len(lines))
    lines[place : place + 1] = dice.choice(([], [lines[place]] * 2, [of_json(lines[place], dice)]))
    return b"\n".join(lines)


def changed_tree(tree: Any, dice: random.Random) -> Any:
    """Return a tree of JSON with one place changed."""
    places = list(_places(tree))
    if not places:
        return dice.choice(ODD)
    # Near the root as often as in a leaf: a tokenizer has thousands of leaves.
    depth = dice.choice(sorted({len(place) for place in places}))
    *way, last = dice.choice([place for place in places if len(place) == depth])
    inside = tree
    for step in way:
        inside = inside[step]
    _change(inside, last, dice)
    return tree


def _places(tree: Any, way: tuple[Any, ...] = (), most_depth: int = 12) -> Iterator[tuple[Any, ...]]:
    if len(way) >= most_depth or not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*way, key)
        yield from _places(value, (*way, key), most_depth)


def _change(inside: Any, key: Any, dice: random.Random) -> None:
    match dice.randrange(8):
        case 0:
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[str(dice.choice(ODD))] = inside.pop(key)
        case 2:
            inside[key] = [inside[key]] * dice.choice((0, 2, 100))
        case 3:
            inside[key] = _nested(dice.choice((2, 20, 180)), dice)
        case 4 if isinstance(inside[key], int):
            inside[key] = inside[key] * dice.choice((-1, 0, 2, 1000)) + dice.choice((-1, 0, 1))
        case 5 if isinstance(inside[key], str):
            inside[key] = of_text(inside[key].encode("utf-8", "replace"), dice).decode("utf-8", "replace")
        case _:
            inside[key] = copy.deepcopy(dice.choice(ODD))


def _nested(depth: int, dice: random.Random) -> Any:
    found: Any = dice.choice((0, "x"))
    for _ in range(depth):  # json.dumps goes no deeper than four times the largest
        found = [found]
    return found


# --- bytes --------------------------------------------------------------------------------------


def of_bytes(data: bytes, dice: random.Random) -> bytes:
    """Bytes flipped, cut, added, repeated, or a whole number of eight bytes put in."""
    found = bytearray(data)
    place = dice.randrange(len(found) + 1)
    match dice.randrange(6):
        case 0 if found:
            found[place % len(found)] ^= 1 << dice.randrange(8)
        case 1:
            del found[place:]
        case 2:
            found += dice.randbytes(dice.choice((1, 8, 4096)))
        case 3:
            found[place:place] = found[max(0, place - 64) : place]
        case 4:
            found[place : place + 8] = WHOLE.pack(dice.choice(LENGTHS))
        case _:
            found[place : place + 4] = dice.randbytes(4)
    return bytes(found)


def of_front(data: bytes, dice: random.Random) -> bytes:
    """The same in the first 4 KiB, where headers are."""
    if dice.random() < 0.2:
        return of_bytes(data, dice)
    return of_bytes(data[:4096], dice) + data[4096:]


def of_safetensors(data: bytes, dice: random.Random) -> bytes:
    """A safetensors file: its header as JSON, its length, or its bytes."""
    (length,) = WHOLE.unpack(data[:8].ljust(8, b"\0"))
    if length > len(data) or dice.random() < 0.3:
        return of_front(data, dice)
    header = of_json(data[8 : 8 + length], dice)
    said = len(header) if dice.random() < 0.9 else dice.choice(LENGTHS)
    return WHOLE.pack(said) + header + data[8 + length :]


# --- texts --------------------------------------------------------------------------------------


def of_text(data: bytes, dice: random.Random) -> bytes:
    """A text with odd characters put in, or parts lost or repeated."""
    place = dice.randrange(len(data) + 1)
    odd = str(
        dice.choice((*ODD, "+", "@", ":", ",", '"', "\n", "\r", "\t", "\\", "[", "{", "\ufeff"))
    ).encode("utf-8", "surrogatepass")
    match dice.randrange(5):
        case 0:
            return data[:place] + odd + data[place:]
        case 1:
            return data[: dice.randrange(len(data) + 1)] + data[place:]
        case 2:
            return data[:place] + data[max(0, place - 32) : place] * dice.choice((1, 3, 200)) + data[place:]
        case 3:
            return odd
        case _:
            return of_bytes(data, dice)


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": of_json,
    "lines": of_lines,
    "bytes": of_bytes,
    "front": of_front,
    "safetensors": of_safetensors,
    "text": of_text,
}
"""how a file of a kind is changed"""
