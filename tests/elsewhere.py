"""Windows and macOS, as far as one can have them on Linux: what those systems lack or refuse, taken away here.

`windows(monkeypatch)` is for this process: folders are not opened, files that are open or mapped are neither replaced
nor removed, nothing is forked, signalled or asked for its load, and text without an encoding is cp1252 with other line
ends. `open_files` says what is open or mapped.
"""

import builtins
import errno
import io
import multiprocessing
import os
import shutil
import signal
import sys

NOT_THERE = (
    "getloadavg",
    "fork",
    "sched_getaffinity",
    "fchmod",
    "fchown",
    "chown",
    "mkfifo",
    "getuid",
    "nice",
    "statvfs",
)


def open_files():
    """The files that this process has open or mapped, as real paths."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # that of the listing itself
            continue
    with builtins.open("/proc/self/maps", encoding="utf-8") as file:
        found.update(line.split(maxsplit=5)[5].rstrip("\n") for line in file if len(line.split(maxsplit=5)) == 6)
    return found


def _in_use(path):
    """Whether a file is open or mapped, or one in a folder is."""
    real = os.path.realpath(path)
    return any(each == real or each.startswith(real + os.sep) for each in open_files())


def _refused(path):
    return PermissionError(errno.EACCES, "The process cannot access the file because it is being used", str(path))


def windows(monkeypatch):
    """Take away what Windows has not, until the test ends."""
    for name in NOT_THERE:
        monkeypatch.delattr(os, name, raising=False)
    for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "alarm", "pthread_kill"):
        monkeypatch.delattr(signal, name, raising=False)
    for name in ("resource", "fcntl", "pwd", "grp"):
        if name not in sys.modules:  # what others use, such as the lock of a folder, has its own way there
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(shutil, "_use_fd_functions", False)

    real = {name: getattr(os, name) for name in ("open", "replace", "rename", "unlink", "remove", "fsync")}

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        if _asks("filelock", 3):
            return real["open"](path, flags, mode, dir_fd=dir_fd)
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real["open"](path, flags, mode)

    def synced(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        with builtins.open(f"/proc/self/fdinfo/{number}", encoding="utf-8") as file:
            flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
        if not flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real["fsync"](descriptor)

    def replaced(source, target, **given):
        if os.path.isdir(target):
            raise _refused(target)
        for path in (source, target):
            if os.path.lexists(path) and _in_use(path):
                raise _refused(path)
        return real["replace"](source, target)

    def renamed(source, target, **given):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(target))
        return replaced(source, target)

    def removed(path, **given):
        if os.path.isdir(path) and not os.path.islink(path):
            raise PermissionError(errno.EACCES, "Access is denied", str(path))
        if _asks("filelock", 3):  # it has another way on Windows
            return real["unlink"](path)
        if os.path.lexists(path) and _in_use(path):
            raise _refused(path)
        return real["unlink"](path)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "unlink", removed)
    monkeypatch.setattr(os, "remove", removed)

    plain = io.open

    def text(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if "b" not in mode and encoding in (None, "locale") and _asks("sparse_context"):
            encoding, newline = "cp1252", "\r\n" if newline is None and "r" not in mode else newline
        return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)

    monkeypatch.setattr(io, "open", text)
    monkeypatch.setattr(builtins, "open", text)


def _asks(package, depth=8):
    """Whether code of this package asks, be it by the standard library."""
    frame = sys._getframe(2)
    for _ in range(depth):
        if frame is None:
            return False
        if f"{os.sep}{package}{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
