"""Situations with the Hub, as data: what the server does, what was typed, and what must come of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from safetensors.torch import load, save

from hub_ground import PAIR, Ground
from hub_server import OTHER_TOKEN, TOKEN, Fault, Repository, files_of
from lazarus.demo import BASE

FILE = r"/org/base/resolve/[^/]+/"
"""what the paths of files of org/base begin with"""
API, LARGE_FILES = r"GET /api/models/.*", r"GET /cdn/.*"
QUICK = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
HTML = {"Content-Type": "text/html"}
LITTLE_ROOM = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
"""
"""no file may be longer than a megabyte, and the weights are"""
READ_ONLY = """
import ctypes, os, pathlib
for folder in [*pathlib.Path(os.environ["HF_HOME"]).rglob("*"), pathlib.Path(os.environ["HF_HOME"])]:
    folder.is_dir() and not folder.is_symlink() and folder.chmod(0o555)
# Without its capabilities, root too must do what the modes say.
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
ctypes.CDLL(None).capset(header, none)
"""


@dataclass(frozen=True)
class Situation:
    """What goes wrong, or otherwise than usual."""

    title: str
    told: str
    """what the page says of it"""
    says: tuple[str, ...] = ()
    """parts of the message, or of the note where the command succeeds"""
    faults: tuple[Fault, ...] = ()
    code: int = 1
    argv: tuple[str, ...] = PAIR
    prepare: Callable[[Ground], None] = Ground.empty
    """makes the cache and the repositories what they are"""
    env: Mapping[str, str | None] = field(default_factory=dict)
    before: str = ""
    most_wait: float = 40.0
    """the seconds between tries, in all"""


def refused(title: str, told: str, *says: str, **how: object) -> Situation:
    """Return a situation in which the command fails."""
    return replace(Situation(title, told, says), **how)  # type: ignore[arg-type]


def done(title: str, told: str, *says: str, **how: object) -> Situation:
    """Return a situation in which the command gives the right numbers all the same."""
    return replace(Situation(title, told, says, code=0), **how)  # type: ignore[arg-type]


def named(name: str) -> tuple[str, ...]:
    """Return the usual command with this name in the place of base's."""
    return tuple(name if each == "org/base" else each for each in PAIR)


def _with(**how: object) -> Callable[[Ground], None]:
    def prepare(ground: Ground) -> None:
        ground.empty()
        repository = ground.hub.repositories["org/base"]
        ground.hub.repositories["org/base"] = replace(repository, **how)  # type: ignore[arg-type]

    return prepare


def _holding(change: Callable[[dict[str, bytes]], None]) -> Callable[[Ground], None]:
    def prepare(ground: Ground) -> None:
        ground.empty()
        files = files_of(BASE)
        change(files)
        ground.hub.repositories["org/base"] = Repository.of(files)

    return prepare


def _a_shard_missing(files: dict[str, bytes]) -> None:
    files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
    names = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}
    index = {"weight_map": {**names, "model.norm.weight": "model-00002-of-00002.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()


def _pickled(files: dict[str, bytes]) -> None:
    files["pytorch_model.bin"] = files.pop("model.safetensors")


def _without_tokenizer(files: dict[str, bytes]) -> None:
    del files["tokenizer.json"], files["tokenizer_config.json"]


def _empty_repository(files: dict[str, bytes]) -> None:
    files.clear()
    files["README.md"] = b"Soon!"


def _half_a_cache(ground: Ground) -> None:
    ground.fill()
    for link in ground.home.glob("hub/models--org--base/snapshots/*/model.safetensors"):
        link.resolve().unlink()
        link.unlink()


def _cached_without(*names: str) -> Callable[[Ground], None]:
    def prepare(ground: Ground) -> None:
        ground.fill()
        for snapshot in ground.home.glob("hub/models--org--base/snapshots/*"):
            for name in names:
                (snapshot / name).unlink()

    return prepare


def _half_of_the_shards(ground: Ground) -> None:
    _holding(_in_shards)(ground)
    ground.run(*PAIR, "-o", "x.json", "-q")
    for link in ground.home.glob("hub/models--org--base/snapshots/*/model-00002-of-00002.safetensors"):
        link.unlink()


def _in_shards(files: dict[str, bytes]) -> None:
    tensors = load(files.pop("model.safetensors"))
    names, places = sorted(tensors), dict[str, str]()
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{i:05}-of-00002.safetensors"
        files[shard] = save({name: tensors[name] for name in part}, {"format": "pt"})
        places |= dict.fromkeys(part, shard)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()


def _a_newer_revision(ground: Ground) -> None:
    ground.fill()
    repository = ground.hub.repositories["org/base"]
    repository.add({**files_of(BASE), "config.json": files_of(BASE)["config.json"] + b"\n"}, "main")


def _gated_and_newer(ground: Ground) -> None:
    _a_newer_revision(ground)
    ground.hub.repositories["org/base"].is_gated = True


SITUATIONS: Mapping[str, tuple[Situation, ...]] = {
    "Names, revisions and access": (
        refused(
            "missing",
            "the Hub has no such repository, or does not show it to anyone without a login",
            "no such model on the Hub",
            "Check the name",
            "hf auth login",
            argv=named("org/bsae"),
        ),
        refused(
            "missing with a token",
            "the same, with a token",
            "no such model on the Hub",
            "an account that may see it",
            argv=named("org/bsae"),
            env={"HF_TOKEN": TOKEN},
        ),
        refused(
            "private",
            "a private repository, with the token of another account",
            "no such model on the Hub",
            "an account that may see it",
            prepare=_with(is_private=True),
            env={"HF_TOKEN": OTHER_TOKEN},
        ),
        refused(
            "token not taken",
            "a token that is mistyped, or was revoked",
            "does not take your token",
            "hf auth logout",
            env={"HF_TOKEN": "hf_mistyped"},
        ),
        refused(
            "unknown revision",
            "`-b org/base@v9`, a revision that there is not",
            "org/base@v9: the model has no such revision",
            "branch, a tag or a commit",
            argv=named("org/base@v9"),
        ),
        refused(
            "gated without a token",
            "a gated repository, without a login",
            "gated",
            "Ask for access",
            "/org/base",
            "hf auth login",
            prepare=_with(is_gated=True),
        ),
        refused(
            "gated without access",
            "a gated repository, with the token of an account that has no access",
            "gated",
            "no access",
            "/org/base",
            prepare=_with(is_gated=True),
            env={"HF_TOKEN": OTHER_TOKEN},
        ),
        refused(
            "no token",
            "a token with a letter that no token has",
            "your token holds a character that no token has",
            "hf auth login",
            env={"HF_TOKEN": "hf_\u00e9"},
        ),
        refused(
            "closed",
            "a repository that the Hub has closed",
            "has closed this repository",
            faults=(Fault(API, 403, {"X-Error-Message": "Access to this resource is disabled."}),),
        ),
        done(
            "renamed",
            "a repository that has another name by now: the Hub says so, and its files are read",
            prepare=lambda ground: _renamed(ground),
            argv=named("org/old"),
        ),
    ),
    "What a repository holds": (
        refused(
            "empty",
            "no model in it",
            "the repository holds no config.json",
            "README.md",
            prepare=_holding(_empty_repository),
        ),
        refused(
            "a shard missing",
            "the index names a file of weights that was not uploaded",
            "1 of its 2 files of weights are missing",
            "model-00002-of-00002.safetensors",
            prepare=_holding(_a_shard_missing),
        ),
        refused(
            "pickled",
            "pickled weights alone: they are not fetched",
            "Pickled weights",
            "save_pretrained",
            prepare=_holding(_pickled),
        ),
        done(
            "no tokenizer",
            "no tokenizer in base: that of the other model reads the prompts",
            "org/base brings no tokenizer",
            prepare=_holding(_without_tokenizer),
        ),
        refused(
            "listed and missing",
            "a file that the Hub lists and does not give",
            "model.safetensors cannot be fetched",
            "404",
            "lists the file",
            faults=(Fault(f".* {FILE}model.safetensors", 404, {"X-Error-Code": "EntryNotFound"}),),
        ),
    ),
    "The Hub limits, or is not well": (
        done(
            "429 and a short wait",
            "429, with `Retry-After: 2`: it is waited for that long",
            faults=(Fault(API, 429, {"Retry-After": "2"}, times=1),),
        ),
        refused(
            "429 and a long wait",
            "429, with `Retry-After: 3600`: nobody waits for an hour without being told",
            "answers 429",
            "asked too often",
            "Wait 3600 seconds",
            "With a login",
            faults=(Fault(API, 429, {"Retry-After": "3600"}),),
            most_wait=0,
        ),
        refused(
            "429 and a long wait on a file",
            "the same, for a file",
            "config.json cannot be fetched",
            "answers 429",
            "Wait 3600 seconds",
            faults=(Fault(f".* {FILE}.*", 429, {"Retry-After": "3600"}),),
            most_wait=0,
        ),
        refused(
            "429 by the draft of the IETF",
            '429, with `RateLimit: "api";r=0;t=290`',
            "Wait 290 seconds",
            faults=(Fault(API, 429, {"RateLimit": '"api";r=0;t=290'}),),
            most_wait=0,
        ),
        refused(
            "429 without a time",
            "429, and not how long to wait",
            "config.json cannot be fetched",
            "answers 429",
            "Wait a few minutes",
            faults=(Fault(f".* {FILE}.*", 429),),
        ),
        done("500 once", "500, and well a second later", faults=(Fault(API, 500, times=1),)),
        done(
            "502 twice",
            "502 for a file, and well a second later",
            faults=(Fault(f"HEAD {FILE}config.json", 502, times=2),),
        ),
        refused(
            "503 for ever",
            "503 for ever",
            "answers 503",
            "Run again later",
            faults=(Fault(API, 503),),
        ),
        refused(
            "503 for a file",
            "503 for a file, for ever",
            "config.json cannot be fetched",
            "answers 503",
            faults=(Fault(f".* {FILE}.*", 503),),
        ),
        done(
            "504 for a large file once",
            "504 where large files are, and well a second later",
            faults=(Fault(LARGE_FILES, 504, times=1),),
        ),
        refused(
            "500 for a large file",
            "500 where large files are, for ever",
            "tokenizer.json cannot be fetched: localhost",
            "answers 500",
            faults=(Fault(LARGE_FILES, 500),),
        ),
        refused(
            "403 for a large file",
            "403 where large files are",
            "tokenizer.json cannot be fetched: localhost",
            "answers 403",
            "firewall",
            faults=(Fault(LARGE_FILES, 403),),
        ),
        refused(
            "no Hub",
            "what answers is the login page of a network",
            "is not a Hub",
            "HF_ENDPOINT",
            faults=(Fault(".*", 200, HTML, body=b"<html>Welcome!</html>"),),
        ),
        done(
            "a mirror of files alone",
            "a mirror that has the files, and does not list them",
            faults=(Fault(r"GET /api/.*", 404),),
        ),
    ),
    "The connection": (
        refused(
            "nobody there",
            "the connection is closed before an answer comes",
            "not in the cache",
            "cannot be reached",
            "the connection, the proxy and HF_ENDPOINT",
            faults=(Fault(API, drops=True),),
        ),
        refused(
            "gone on the way",
            "the same, after the first file",
            "generation_config.json cannot be fetched from the Hub",
            "Check the connection",
            faults=(Fault(f".* {FILE}(?!config.json).*", drops=True),),
        ),
        refused(
            "hanging",
            "no answer: after `HF_HUB_ETAG_TIMEOUT` (10 seconds) it is asked twice more",
            "cannot be reached",
            "timed out",
            faults=(Fault(API, hangs=True),),
            env=QUICK,
        ),
        refused(
            "hanging on a file",
            "no answer for a file",
            "config.json cannot be fetched from the Hub",
            "timed out",
            faults=(Fault(f"HEAD {FILE}config.json", hangs=True),),
            env=QUICK,
        ),
        done(
            "cut once",
            "a connection cut in a file: the rest of it is fetched",
            faults=(Fault(LARGE_FILES, cut=1000, times=1),),
        ),
        done("cut three times", "cut three times in a file", faults=(Fault(LARGE_FILES, cut=1000, times=3),)),
        done(
            "cut, and no ranges",
            "cut, and the server sends files from their beginning only",
            faults=(Fault(LARGE_FILES, cut=1000, times=1), Fault(LARGE_FILES, no_ranges=True)),
        ),
        refused(
            "cut for ever",
            "cut for ever",
            "tokenizer.json cannot be fetched from the Hub",
            "Check the connection",
            faults=(Fault(LARGE_FILES, cut=0),),
        ),
        refused(
            "too short",
            "a file that comes shorter than the Hub says, and its end looks like one",
            "tokenizer.json came with 1000 of its 72718 bytes",
            "not kept",
            faults=(Fault(LARGE_FILES, body=b"x" * 1000, status=200),),
        ),
        refused(
            "other bytes",
            "a large file with other bytes than the Hub's digest is of",
            "tokenizer.json came damaged",
            "not kept",
            faults=(Fault(LARGE_FILES, garbled=True),),
        ),
        refused(
            "other bytes in a small file",
            "the same of a small file",
            "config.json came damaged",
            "not kept",
            faults=(Fault(f"GET {FILE}config.json", garbled=True),),
        ),
    ),
    "The cache, and no network": (
        refused(
            "nowhere to write",
            "`HF_HOME` where nothing can be written",
            "the cache cannot be written",
            "HF_HOME",
            env={"HF_HOME": "/sys/hub"},
        ),
        refused(
            "read-only with an older revision",
            "a cache that is read-only, and holds another revision",
            "the cache cannot be written",
            "HF_HOME",
            prepare=_a_newer_revision,
            before=READ_ONLY,
        ),
        done(
            "read-only and full",
            "a cache that is read-only and holds all",
            prepare=Ground.fill,
            before=READ_ONLY,
        ),
        refused(
            "no folder",
            "`HF_HUB_CACHE` in what is no folder",
            "the cache cannot be written: Not a directory: /dev/null",
            "HF_HOME",
            env={"HF_HUB_CACHE": "/dev/null/hub"},
        ),
        refused(
            "no room",
            "no room for the weights",
            "no room on the disk",
            "HF_HOME",
            before=LITTLE_ROOM,
        ),
        refused(
            "offline and nothing cached",
            "`HF_HUB_OFFLINE=1`, and the model is not in the cache",
            "not in the cache",
            "unset HF_HUB_OFFLINE",
            env={"HF_HUB_OFFLINE": "1"},
        ),
        refused(
            "offline and half cached",
            "`HF_HUB_OFFLINE=1`, and the cache holds a part of the model",
            "org/base: its weights are not in the cache",
            "Unset HF_HUB_OFFLINE",
            prepare=_half_a_cache,
            env={"HF_HUB_OFFLINE": "1"},
        ),
        refused(
            "offline and half of the shards",
            "the same, of shards",
            "1 of its 2 files of weights are not in the cache",
            "Unset HF_HUB_OFFLINE",
            prepare=_half_of_the_shards,
            env={"HF_HUB_OFFLINE": "1"},
        ),
        refused(
            "offline and no tokenizer.json",
            "the same, of a tokenizer",
            "tokenizer.json is not in the cache",
            "Unset HF_HUB_OFFLINE",
            prepare=_cached_without("tokenizer.json"),
            env={"HF_HUB_OFFLINE": "1"},
        ),
        done(
            "offline and no tokenizer",
            "the same, without any file of base's tokenizer",
            "org/base has no tokenizer in the cache; the other model's was used for both",
            prepare=_cached_without("tokenizer.json", "tokenizer_config.json"),
            env={"HF_HUB_OFFLINE": "1"},
        ),
        done(
            "offline and no settings of the tokenizer",
            "the same, without the tokenizer's settings",
            "org/base: the cache holds tokenizer.json and no tokenizer_config.json, which the Hub may have",
            prepare=_cached_without("tokenizer_config.json"),
            env={"HF_HUB_OFFLINE": "1"},
        ),
        done(
            "offline and cached",
            "`HF_HUB_OFFLINE=1`, and the cache holds all: nothing is asked",
            prepare=Ground.fill,
            env={"HF_HUB_OFFLINE": "1"},
        ),
        done(
            "down and cached",
            "the Hub is down, and the cache holds the model: a note says so, and of which commit it is",
            "the Hub could not be asked (it answers 503 Service Unavailable)",
            "at commit",
            "a newer one",
            prepare=Ground.fill,
            faults=(Fault(".*", 503),),
        ),
        done(
            "unreachable and cached",
            "the Hub cannot be reached, and the cache holds the model",
            "the Hub could not be asked",
            "at commit",
            prepare=Ground.fill,
            faults=(Fault(".*", drops=True),),
            most_wait=0,
        ),
        done(
            "down and another revision",
            "the Hub is down, and has a newer revision than the cache",
            "the Hub could not be asked",
            "at commit",
            prepare=_a_newer_revision,
            faults=(Fault(".*", 503),),
        ),
        done(
            "token revoked and cached",
            "the Hub does not take the token, and the cache holds the model",
            "the Hub could not be asked (it answers 401 Unauthorized)",
            "at commit",
            prepare=Ground.fill,
            env={"HF_TOKEN": "hf_revoked"},
        ),
        refused(
            "down and half cached",
            "the Hub is down, and the cache holds a part of the model",
            "org/base: its weights are not in the cache",
            "the Hub could not be asked. Run again",
            prepare=_half_a_cache,
            faults=(Fault(".*", 503),),
        ),
        refused(
            "gated since",
            "the Hub has a newer revision than the cache, and it is gated by now",
            "gated",
            "Ask for access",
            prepare=_gated_and_newer,
        ),
    ),
}


def _renamed(ground: Ground) -> None:
    ground.empty()
    ground.hub.repositories["org/old"] = Repository({}, {}, moved_to="org/base")
