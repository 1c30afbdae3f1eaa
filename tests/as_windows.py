"""Imports every module of lazarus, runs commands, and prints how each ended: a JSON list on standard output.

With `--windows` all of that without what Windows lacks: modules and names of POSIX are hidden from lazarus,
though not from the libraries under it, and no file is removed, renamed or written over that is still open or
mapped. What is left of Windows is not tried: its paths, its consoles, its builds of the libraries.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import pkgutil
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
OF_OS = """
O_NONBLOCK O_NOFOLLOW O_DIRECTORY O_CLOEXEC WNOHANG chown chroot fchmod fchown fork forkpty getegid
geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getresuid getsid getuid initgroups
killpg lchown mkfifo mknod nice openpty posix_fadvise posix_fallocate posix_spawn pread pwrite
register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile set_blocking setgid
setpgid setpriority setsid setuid statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4
waitid
"""
OF_SIGNAL = """
ITIMER_REAL SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2
SIGXCPU SIG_BLOCK SIG_UNBLOCK alarm getitimer pause pthread_kill pthread_sigmask setitimer
sigpending sigtimedwait sigwait
"""
NAMES = {"os": set(OF_OS.split()), "signal": set(OF_SIGNAL.split())}
"""what Python's documentation says is not there on Windows, of what a tool might use"""


def hide_posix() -> None:
    """Hide modules and names of POSIX from every module of lazarus that is imported from here on."""
    real: Any = builtins.__import__
    shown = {module.__name__: _without(module, NAMES[module.__name__]) for module in (os, signal)}

    def imported(name: str, places: Any = None, *rest: Any, **named: Any) -> Any:
        if not str((places or {}).get("__name__")).startswith("lazarus"):
            return real(name, places, *rest, **named)
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return shown.get(name) or real(name, places, *rest, **named)

    setattr(builtins, "__import__", imported)  # noqa: B010


def _without(module: ModuleType, names: set[str]) -> ModuleType:
    found = ModuleType(module.__name__)
    found.__dict__.update({name: value for name, value in vars(module).items() if name not in names})
    return found


def hold_open_files() -> None:
    """Refuse to remove or to replace a file that this process has open or mapped."""
    for name, which in (("unlink", [0]), ("remove", [0]), ("rename", [0, 1]), ("replace", [0, 1])):
        setattr(os, name, _held(getattr(os, name), which))


def _held(real: Callable[..., None], which: list[int]) -> Callable[..., None]:
    def asked(*paths: Any, **folders: Any) -> None:
        for place in which:
            folder = folders.get("dir_fd")
            root = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
            path = os.path.join(root, os.fspath(paths[place]))
            if os.path.realpath(path) in _in_use():
                raise PermissionError(errno.EACCES, "another process uses this file", path)
        real(*paths, **folders)

    return asked


def _in_use() -> set[str]:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    found = {line.split(maxsplit=5)[-1] for line in maps}
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # that of the list itself
            continue
    return found


def import_all() -> list[str]:
    """Import every module of lazarus, and return their names."""
    import lazarus

    names = [found.name for found in pkgutil.walk_packages(lazarus.__path__, "lazarus.")]
    names = [name for name in names if name not in ("lazarus.__main__", "lazarus.demo.train")]
    for name in names:
        __import__(name)
    return names


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a command as the console script does; return its exit code, and what it printed."""
    from lazarus.cli import main

    # A console of Windows may know Latin letters alone.
    printed, code = TextIOWrapper(BytesIO(), encoding="cp1252"), 0
    sys.argv = ["lazarus", *arguments]
    try:
        with redirect_stdout(printed):
            main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    printed.seek(0)
    return {"arguments": arguments, "code": code, "printed": printed.read()}


if __name__ == "__main__":
    if "--windows" in sys.argv:
        hide_posix()
        hold_open_files()
    # An encoding that is not named is that of the system: UTF-8 here, and often not on Windows.
    warnings.filterwarnings("error", category=EncodingWarning, module=r"lazarus\.")
    modules = import_all()
    ended = [run(arguments) for arguments in json.load(sys.stdin)]
    sys.stdout.write(json.dumps({"modules": modules, "ended": ended}))
