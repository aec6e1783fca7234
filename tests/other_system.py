"""Runs a script as on a system without what POSIX has; an honest trial of Windows it is not.

python tests/other_system.py train_text_to_image <its flags>

The project's own code finds no signals, functions or folders to open that Windows lacks; files that this process holds
open or mapped can't be renamed, replaced or removed; files that are open for reading can't be synced; processes are
spawned, not forked. Other packages have their own ways on each system, and keep what they know.
"""

import errno
import fcntl
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LACKING = {
    "signal": {
        *("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGCONT"),
        *("pause", "alarm", "setitimer", "sigwait", "pthread_kill", "pthread_sigmask", "siginterrupt"),
    },
    "os": {
        *("fork", "forkpty", "kill", "killpg", "getpgid", "setpgid", "setsid", "getuid", "geteuid", "getgid", "wait"),
        *("statvfs", "sched_getaffinity", "O_DIRECTORY", "O_NOFOLLOW", "mkfifo", "uname", "getloadavg", "sysconf"),
        *("chown", "nice", "pread", "pwrite", "sync", "fdatasync", "posix_fadvise", "sendfile", "openpty", "ttyname"),
    },
}
MODULES = {"fcntl", "resource", "pwd", "grp", "pty", "termios", "tty", "syslog", "posix"}
OWN = ("utils", "train_text_to_image", "train_unconditional", "evaluate_pipeline")


class Lacking(ModuleType):
    """A module as the project's own code sees it: without some names, and some functions others."""

    def __init__(self, module: ModuleType, names: set[str], others: dict[str, Any]):
        super().__init__(module.__name__)
        self.__dict__["_module"], self.__dict__["_names"], self.__dict__["_others"] = module, names, others

    def __getattr__(self, name: str) -> Any:
        if is_own(sys._getframe(1).f_globals.get("__name__", "")):
            if name in self._names:
                raise AttributeError(f"module {self.__name__} has no attribute {name}")
            if name in self._others:
                return self._others[name]
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def is_own(module: str) -> bool:
    """Whether a module is the project's."""
    return module.partition(".")[0] in OWN


def held() -> set[str]:
    """The files that this process has open or mapped."""
    files = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            files.add(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        files.add(line.split(maxsplit=5)[5] if line.count(" ") >= 5 and "/" in line else "")
    return files


def refusing(function: Callable) -> Callable:
    """A function that renames or removes files, but none that are open or mapped."""

    def call(*paths: Any, **more: Any) -> Any:
        for path in paths:
            if isinstance(path, int) or "dir_fd" in more:
                continue
            whole = os.path.abspath(os.fsdecode(path))
            used = [file for file in held() if file == whole or file.startswith(whole + "/")]
            if used:
                raise PermissionError(errno.EACCES, f"{used[0]} is open or mapped", whole)
        return function(*paths, **more)

    return call


def open_no_folder(path: Any, *arguments: Any, **more: Any) -> int:
    """As os.open on Windows."""
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return os.open(path, *arguments, **more)


def sync_what_is_written(descriptor: int) -> None:
    """As os.fsync on Windows."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    os.fsync(descriptor)


def take_away() -> None:
    """Takes away what is not on every system, from the project's code that is imported from now on."""
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, refusing(getattr(os, name)))
    shutil._use_fd_functions = False  # it removes folders by paths, as on Windows
    others = {"os": {"open": open_no_folder, "fsync": sync_what_is_written}, "signal": {}}
    for name, names in LACKING.items():
        sys.modules[name] = Lacking(sys.modules[name], names, others[name])
    sys.meta_path.insert(0, NoModules())
    multiprocessing.set_start_method("spawn")


class NoModules:
    """Finds no modules that are POSIX's alone, for the project's code."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        """Refuses them to the project's code."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        if name in MODULES and frame is not None and is_own(frame.f_globals.get("__name__", "")):
            raise ModuleNotFoundError(name)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch.utils.data._utils.signal_handling as torchs
    from tqdm import tqdm  # noqa: F401  it asks for fcntl, and has its own way without

    torchs.IS_WINDOWS = True  # where torch looks for no SIGCHLD
    assert hasattr(signal, "SIGCHLD")
    take_away()
    script = importlib.import_module(sys.argv.pop(1))
    sys.exit(script.main())
