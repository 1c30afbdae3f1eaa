"""Chat templates, rendered in a process of their own: a stranger's may loop, or fill the memory.

jinja2's sandbox keeps a template from the machine, but not from computing `10**(10**9)`, and a call into C
can only be stopped with its process. So one process is forked for all renderings of a run. Where processes
cannot be forked, as on Windows, templates are rendered in this one, without a limit.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any

import psutil
from jinja2 import TemplateError

from lazarus.blame import one_line
from lazarus.bounds import LIFT, MEMORY_OF_A_TEMPLATE, MOST_RENDERED, SECONDS_OF_A_TEMPLATE, lifted
from lazarus.errors import ChatTemplateError
from lazarus.messages import option

_PARALLELISM = "TOKENIZERS_PARALLELISM"
_MOST_SAID = 2000
"""characters of what a template's fault says"""
_MOST_ANSWERED = 12 * MOST_RENDERED + 2**20
"""bytes of an answer: a character is at most two escapes of six bytes"""


class TemplateLimitError(ChatTemplateError):
    """A chat template that does not end, or writes without end: no other form of the messages is tried."""


@dataclass(frozen=True)
class Call:
    """A chat, and the template that writes it."""

    messages: Sequence[Mapping[str, Any]]
    template: str
    begins: bool
    """whether the beginning of an assistant's turn is written after the messages"""
    given: Mapping[str, Any] = field(default_factory=dict)
    """what the row gives the template beside the messages"""

    def rendered(self, tokenizer: Any) -> str:
        """Return what the template writes, here and now; what it raises is raised."""
        text: str = tokenizer.apply_chat_template(
            list(self.messages),
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=self.begins,
            **self.given,
        )
        return text


class Renderer:
    """Renders a tokenizer's chats while its context lasts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._child: tuple[int, Connection] | None = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._end()

    def render(self, call: Call, place: str) -> str:
        """Return what a template makes of a chat; `place` names the prompt in errors.

        Raises:
            ChatTemplateError: it fails.
            TemplateLimitError: it takes too long, too much memory, or writes too much.
        """
        if self._child is None and not lifted():
            self._child = _forked(self._tokenizer)
        if self._child is None:
            return self._here(call, place)
        with ExitStack() as broken:
            broken.callback(self._end)  # after an interrupt too, which leaves an answer on its way
            try:
                answer = self._answer(self._child[1], call)
            except (EOFError, OSError) as error:
                raise _beyond(place, "ends the process that it is rendered in") from error
            broken.pop_all()
        match answer:
            case {"text": str(text)}:
                return text
            case {"fault": str(said)}:
                raise _failure(place, said)
            case {"beyond": str(said)}:
                self._end()
                raise _beyond(place, said)
        # What is no fault of the template is raised here as it is, with its trace.
        return self._here(call, place)

    def _here(self, call: Call, place: str) -> str:
        caught = _Caught()
        with caught:
            return call.rendered(self._tokenizer)
        assert caught.error is not None
        if (said := _said(caught.error)) is None:
            raise caught.error
        raise _failure(place, said) from caught.error

    def _answer(self, pipe: Connection, call: Call) -> Any:
        pipe.send(call)
        if not pipe.poll(SECONDS_OF_A_TEMPLATE):
            return {"beyond": f"takes more than {SECONDS_OF_A_TEMPLATE} s"}
        return json.loads(pipe.recv_bytes(_MOST_ANSWERED))

    def _end(self) -> None:
        if self._child is not None:
            (process, pipe), self._child = self._child, None
            pipe.close()
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            with suppress(ChildProcessError):  # somebody else has waited for it
                os.waitpid(process, 0)


def _forked(tokenizer: Any) -> tuple[int, Connection] | None:
    """Fork a process that renders this tokenizer's chats; None where there is no forking."""
    if not hasattr(os, "fork"):
        return None
    ours, theirs = Pipe()
    configured = os.environ.get(_PARALLELISM)
    # Without it the package tokenizers, once it has used threads, warns on standard error of each fork.
    os.environ.setdefault(_PARALLELISM, "true")
    try:
        with warnings.catch_warnings():
            # Of threads, from Python 3.12 on: the child takes no lock that they may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
    except OSError:  # no memory, or no process, is left for it
        return None
    finally:
        if configured is None:
            del os.environ[_PARALLELISM]
    if process == 0:
        try:
            ours.close()
            _serve(theirs, tokenizer)
        finally:
            os._exit(0)
    theirs.close()
    return process, ours


def _serve(pipe: Connection, tokenizer: Any) -> None:
    """Render what comes through the pipe until nobody is at its other end."""
    # A finalizer of what the parent holds, such as one of a temporary folder, is the parent's to run.
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    _limit("RLIMIT_AS", psutil.Process().memory_info().vms + MEMORY_OF_A_TEMPLATE)
    _limit("RLIMIT_CORE", 0)
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        # The parent kills what takes too long. Should it have died, the system does.
        _limit("RLIMIT_CPU", int(sum(os.times()[:2])) + 2 * SECONDS_OF_A_TEMPLATE + 1)
        pipe.send_bytes(json.dumps(_outcome(call, tokenizer)).encode())


def _limit(name: str, most: int) -> None:
    import resource

    kind = getattr(resource, name)
    _, hard = resource.getrlimit(kind)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(OSError, ValueError):  # macOS takes no limit of RLIMIT_AS
        resource.setrlimit(kind, (soft, hard))


def _outcome(call: Call, tokenizer: Any) -> dict[str, str]:
    caught, text = _Caught(), ""
    with caught:
        text = call.rendered(tokenizer)
    if isinstance(caught.error, MemoryError) and _said(caught.error) is not None:
        return {"beyond": f"takes more than {MEMORY_OF_A_TEMPLATE // 2**20} MiB of memory"}
    if caught.error is not None:
        said = _said(caught.error)
        return {"other": ""} if said is None else {"fault": said[:_MOST_SAID]}
    if len(text) > MOST_RENDERED:
        return {"beyond": f"writes more than {MOST_RENDERED} characters"}
    return {"text": text}


class _Caught:
    """A context that keeps what is raised in it: a template may raise whatever there is."""

    error: Exception | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def _said(error: Exception) -> str | None:
    """Return what a template's fault says; None where it is not the template's.

    A template may divide by zero or miss a key, so no list of classes has them all; but the traceback of such
    an error has a frame of jinja2, and one of transformers' faults, or of ours, has none. What transformers
    itself refuses of a chat is a ValueError.
    """
    if not isinstance(error, ValueError) and not _is_in_jinja(error.__traceback__):
        return None
    said = one_line(error)
    return said if isinstance(error, TemplateError) else f"{type(error).__name__}: {said}"


def _is_in_jinja(trace: TracebackType | None) -> bool:
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == "jinja2":
            return True
        trace = trace.tb_next
    return False


def _failure(place: str, said: str) -> ChatTemplateError:
    return ChatTemplateError(
        f"{place}: the chat template fails on it: {said}. Mend the template "
        f"({option('chat_template', 'FILE')}) or the messages.",
        option="chat_template",
    )


def _beyond(place: str, said: str) -> TemplateLimitError:
    return TemplateLimitError(
        f"{place}: the chat template {said}. Mend the template ({option('chat_template', 'FILE')}). {LIFT}",
        option="chat_template",
    )
