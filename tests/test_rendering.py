"""Chat templates have limits of time, memory and output, and leave no process behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import psutil
import pytest

from factories import tiny_tokenizer
from lazarus.bounds import VARIABLE
from lazarus.errors import ChatTemplateError
from lazarus.models import ChatTemplate, render_chats
from lazarus.models.rendering import Call, Renderer, TemplateLimitError
from lazarus.prompts import Prompt

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no limits where there is no fork")

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = "{% set ns=namespace(x='A') %}{% for i in range(60) %}{% set ns.x=ns.x~ns.x %}{% endfor %}"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def render(template: str, prompts: int = 1) -> list[str]:
    chats = ChatTemplate(tiny_tokenizer(template=None), "base", template)
    return render_chats([Prompt(f"t{i}") for i in range(prompts)], chats)[0]


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOPS, r"takes more than 2 s"),
        ("{{ 10**(10**9) }}", r"takes more than|fails on it"),
        ("{{ 5|round(-1000000000) }}", r"takes more than|fails on it"),
        (DOUBLES, r"takes more than (2 s|1024 MiB of memory)"),
        ("{{ 'A '*100000000 }}", r"writes more than 67108864 characters|takes more than"),
        ("{{ 'A'*10**12 }}", r"takes more than 1024 MiB of memory"),
    ],
)
def test_a_template_without_end_ends(template: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazarus.models.rendering.SECONDS_OF_A_TEMPLATE", 2)
    before = children()
    begun = time.monotonic()
    with pytest.raises(ChatTemplateError, match=rf"^Prompt 0 \('t0'\): the chat template ({why})"):
        render(template)
    assert time.monotonic() - begun < 60
    assert children() == before


def test_a_limit_tells_how_to_lift_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazarus.models.rendering.SECONDS_OF_A_TEMPLATE", 1)
    with pytest.raises(TemplateLimitError, match=f"{VARIABLE}=1"):
        render(LOOPS)


def test_one_process_renders_all_chats_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    forks, fork = [], os.fork

    def counted() -> int:
        forks.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", counted)
    before = children()
    assert render(TEMPLATE, 200)[::199] == ["<user>t0", "<user>t199"]
    assert len(forks) == 1
    assert children() == before


def test_without_limits_no_process_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = render(TEMPLATE)
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(os, "fork", None)
    assert render(TEMPLATE) == expected


def test_where_no_process_can_be_forked_templates_are_rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = render(TEMPLATE)
    monkeypatch.delattr(os, "fork")
    assert render(TEMPLATE) == expected
    with pytest.raises(ChatTemplateError, match="fails on it: ZeroDivisionError: division by zero"):
        render("{{ 1/0 }}")


def test_a_template_that_ends_its_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends:
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            os._exit(1)

    with Renderer(Ends()) as renderer, pytest.raises(TemplateLimitError, match="ends the process"):
        renderer.render(Call([], "", begins=True), "Prompt 0")


def test_an_interrupt_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(1, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        render(LOOPS)
    assert children() == before


def test_chats_are_rendered_in_threads() -> None:
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(render(TEMPLATE, 20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [render(TEMPLATE, 20)] * 4


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="writes half a character"):
        render("{{ '\\ud800' }}")
