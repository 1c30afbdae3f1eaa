"""The origin of an exception: this package, another library, or too little memory.

Another library is called in a `Translated` context. What that library raises there becomes an error that says
what to do. What our own code raises there, such as a hook that the library calls, passes as it is: it is a
fault of ours, and must not read as one of the user's model.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lazarus.errors import DeviceError, LazarusError
from lazarus.memory import tightest_limit

_PACKAGE = __name__.partition(".")[0]
_PASSES_ON = ("jaxtyping", "beartype", "torch.utils._contextlib")
"""Modules whose functions stand around functions of others and only call them."""

_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "Unable to allocate",
    "ALLOC_FAILED",
    "bad_alloc",
    "failed to map segment",  # of a library that is imported
)
_ON_A_GPU = re.compile(r"\b(CUDA|HIP|XPU|MPS|CUBLAS|CUDNN|GPU)")
_ASKED_FOR = re.compile(r"allocate (\d[\d.]* ?[KMGTPE]?i?B(?:ytes)?)", re.IGNORECASE)


@dataclass(frozen=True)
class Translated:
    """A call of another library: what it raises is told by `tell`, and `where` says what was being done.

    Some exceptions pass as they are: an error of ours that is meant, a fault of ours, a warning that was made
    an error, and a lack of memory. The last gets a note of `where`, and `MemoryFaults` tells it.
    `also_from_ours` are the types that files, the network and packages raise, whoever opens them.
    """

    where: str
    tell: Callable[[BaseException], LazarusError]
    also_from_ours: tuple[type[Exception], ...] = ()

    def __enter__(self) -> None: ...

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, LazarusError | Warning) or not is_a_fault(error):
            return
        if is_out_of_memory(error):
            error.add_note(self.where)
        elif (meant := _meant(error)) is not None:
            raise meant
        elif isinstance(error, self.also_from_ours) or not is_ours(error):
            raise self.tell(error) from error


class NoRoomError(MemoryError):
    """Memory that will not do, known before it is taken; `MemoryFaults` adds what needs less."""

    def __init__(self, message: str, useless: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.useless = useless
        """the options that would not help either"""


@dataclass(frozen=True)
class MemoryFaults:
    """A context that tells of memory that runs out anywhere inside, in one way, with the options that help.

    Raises:
        DeviceError: memory ran out.
    """

    helps: Sequence[str]
    """what needs less memory, such as `memory="stream"`; the most helpful first"""

    def __enter__(self) -> None: ...

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and is_out_of_memory(error):
            raise DeviceError(out_of_memory(error, self.helps)) from error


def is_a_fault(error: BaseException) -> bool:
    """Return whether an exception tells of a fault, and not that somebody wants to stop."""
    return isinstance(error, Exception) or is_a_panic(error)


def is_a_panic(error: BaseException) -> bool:
    """Return whether a library in Rust, such as tokenizers, has panicked: by name, and by no `Exception`."""
    return type(error).__name__ == "PanicException"


def out_of_memory(error: BaseException, helps: Sequence[str]) -> str:
    """Return the message on an exception that a lack of memory raised."""
    faults = [fault for fault in _chain(error) if _lacks_memory(fault)]
    where = next((note for fault in faults for note in getattr(fault, "__notes__", ())), None)
    text = str(faults[-1])
    asked = _ASKED_FOR.search(text)
    what = f"{'the GPU is ' if _ON_A_GPU.search(text) else ''}out of memory"
    more = f" ({asked[1]} more were asked for)" if asked else ""
    useless = [each for fault in faults if isinstance(fault, NoRoomError) for each in fault.useless]
    *others, last = [each for each in helps if each not in useless] or ("a machine with more memory",)
    advice = f"{', '.join(others)} or {last}" if others else last
    limit = None if _ON_A_GPU.search(text) else tightest_limit()
    more += "" if limit is None else f", within {limit}"
    if isinstance(faults[-1], NoRoomError):
        what, more = text, ""
    told = f"{where}: {what}" if where else what[0].upper() + what[1:]
    return f"{told}{more}. Use {advice}."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a lack of memory raised an exception, in Python, torch, numpy or the system."""
    return not isinstance(error, LazarusError) and any(map(_lacks_memory, _chain(error)))


def _lacks_memory(error: BaseException) -> bool:
    # By name: torch is not imported here, so that a mistake on the command line costs nothing.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # Other types may quote a prompt or a file, whatever it speaks of.
    tells = isinstance(error, RuntimeError | OSError | ImportError)
    tells = tells or type(error).__module__.startswith("safetensors")
    return tells and any(sign in str(error) for sign in _NO_MEMORY)


def is_ours(error: BaseException) -> bool:
    """Return whether code of this package raised an exception, seen from where it is caught.

    So it is where no other library was called, or one called a hook of ours. torch's own functions written in
    C have no frame: what they raise is the fault of whoever calls them.
    """
    owners = list(_owners(error))
    return all(owners) or any(_from_a_hook(each) for each in _chain(error))


def one_line(error: BaseException) -> str:
    """Return what an error says, on one line and without its full stop."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:  # str() begins it with a number
        text = f"{error.strerror}: {error.filename}"
    return " ".join(text.split()).rstrip(".")


def raised_at(error: BaseException) -> str:
    """Return where an exception was raised, and where in this package that was called from."""
    frames = [(_is_ours(name), f"{file}, line {line}") for name, file, line in _frames(error)]
    if not frames:
        return "an unknown place"
    (is_own, place), own = frames[-1], [place for is_own, place in frames if is_own]
    return place if is_own or not own else f"{place}, called at {own[-1]}"


def raised_in(error: BaseException) -> str:
    """Return the name of the package whose code raised an exception; "" where no frame tells."""
    return next((name.partition(".")[0] for name, _, _ in reversed(list(_frames(error)))), "")


def _from_a_hook(error: BaseException) -> bool:
    """Return whether a frame of ours comes below one of another library's."""
    owners = list(_owners(error))
    return False in owners and True in owners[owners.index(False) :]


def _meant(error: BaseException) -> LazarusError | None:
    """Return the error of ours that another library caught and raised again in its own words."""
    found = (fault for fault in _chain(error) if isinstance(fault, LazarusError))
    return next((fault for fault in found if not next(_owners(fault), True)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what it came of."""
    fault: BaseException | None = error
    while fault is not None:
        yield fault
        fault = fault.__cause__ or (None if fault.__suppress_context__ else fault.__context__)


def _owners(error: BaseException) -> Iterator[bool]:
    """Yield, for each frame from the catching one down, whether it is of this package."""
    return (_is_ours(name) for name, _, _ in _frames(error))


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE


def _frames(error: BaseException) -> Iterator[tuple[str, str, int]]:
    """Yield each frame's module, file and line; Python's own modules are no one's."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] in sys.stdlib_module_names or name.startswith(_PASSES_ON):
            continue
        file = Path(frame.f_code.co_filename)
        yield name, "/".join(file.parts[-min(len(file.parts), name.count(".") + 2) :]), line
