"""docs/hub.md, from the situations and what comes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from hub_ground import Ground, Outcome
from hub_situations import Situation

BAR = "\\|"

INTRODUCTION = """\
# The Hub

A MODEL such as `org/name` is a repository of the [Hugging Face Hub](https://huggingface.co). It is fetched
into the Hub's own cache, `~/.cache/huggingface`, which Lazarus shares with transformers and everything else
that uses `huggingface_hub`: what is there is not fetched again.

    lazarus introspect activation-diff -b org/base -f org/arithmetic@v2 -p "3 + 4 ="

**Revisions.** `org/name@revision` is a branch, a tag or a commit; without one it is `main`. The Hub is
asked once, when the name is read, for the commit that it stands for. Every file is of that commit, and the
result has it (`base.revision`), so that a run can be repeated when the branch has moved on.

**What is fetched.** The configuration, the tokenizer's files and templates, and one set of safetensors.
Pickled weights are not. Each file is held against the digest of the Hub when it has come, and does not stay
in the cache if it is another. `--estimate` of models that are not in the cache fetches them too, to
time how fast they are read.

**Login.** The token is that of `hf auth login`, or `HF_TOKEN`. It is sent to the Hub alone, and not to the
hosts that its large files are on.

**Offline.** With `HF_HUB_OFFLINE=1` nothing is asked, and the cache is all there is. Where the Hub cannot
be asked otherwise, and the cache holds the revision, it is read from there, and a note of the result says
so (`hub-unreachable`) with the commit: the Hub may have a newer one.

**A mirror.** `HF_ENDPOINT` names another Hub. Proxies are those of the environment (`HTTPS_PROXY`).
`HF_HOME` puts the cache elsewhere. All of huggingface_hub's [environment
variables](https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables) hold.

**Waiting.** What may pass (429, 5xx, a connection that breaks) is tried again after one, two and more
seconds, and what was cut off is taken up where it ended. If the Hub asks to wait, it is waited for up to 30
seconds; beyond that the message says for how long, and the command ends. No request of a command is without
a limit: `HF_HUB_ETAG_TIMEOUT` and `HF_HUB_DOWNLOAD_TIMEOUT` (10 seconds each) say how long a server may be
silent. In Python, these limits are those that your process has set for huggingface_hub.

Below is what the command says in each situation. The tests put a server in the place of the Hub and have it
do all of this over HTTP; after each failure they run the command again, with the same cache and a server
that is well, and hold its numbers, bit for bit, against those of the folders. What says `done` gives these
numbers at once.

This page is written by `make docs-reference` from the tests (`tests/hub_situations.py`), which run every
line of it.
"""


def page(
    groups: Mapping[str, Sequence[Situation]], outcome_of: Callable[[Situation], Outcome], ground: Ground
) -> str:
    """The whole page, a table a group."""
    tables = [_table(title, group, outcome_of, ground) for title, group in groups.items()]
    return "\n".join([INTRODUCTION, *tables])


def _table(
    title: str, group: Sequence[Situation], outcome_of: Callable[[Situation], Outcome], ground: Ground
) -> str:
    lines = [f"## {title}", "", "| what happens | exit | what it says |", "|---|---|---|"]
    for situation in group:
        outcome = outcome_of(situation)
        said = outcome.err.removeprefix("Error: ").strip() or _note(situation, outcome)
        cells = (situation.told, str(outcome.code), _anywhere(said, ground))
        lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join([*lines, ""])


def _note(situation: Situation, outcome: Outcome) -> str:
    notes = [note for note in outcome.result["notes"] if any(part in note for part in situation.says)]
    return f"done; a note: {notes[0]}" if notes else "done"


def _anywhere(text: str, ground: Ground) -> str:
    """Without what depends on the machine and on the run."""
    text = text.replace(f" at {ground.hub.endpoint}", "").replace(
        ground.hub.endpoint, "https://huggingface.co"
    )
    text = text.replace(f"localhost:{ground.hub.port}", "cdn.example.org")
    text = text.replace(str(ground.home), "~/.cache/huggingface")
    text = text.replace("Operation not permitted", "Permission denied")  # so it is put to root
    text = re.sub(r"/blobs/\S+|/(refs|\.no_exist|snapshots)/\S+", "/…", text)
    return re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1…", text)
