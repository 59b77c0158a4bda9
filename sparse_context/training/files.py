"""Files of a run: who may write its folder, and what is said where that fails."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..images import FULL, error_number


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run; ends with the process, however that ends. Raises ValueError where another holds it.

    Folders that were not there are made, and removed again if nothing was written.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    held = folder / ".lock"
    lock = FileLock(held)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Another run is writing into {folder}: wait for its end, or name another folder."
            ) from error
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            with contextlib.suppress(OSError):
                held.unlink(missing_ok=True)
            raise OSError(f"{folder} cannot be written ({reason(error)}): name another folder.") from error
        try:
            yield
        finally:
            try:
                held.unlink(missing_ok=True)  # while it is held, or it might be the next run's
                lock.release()
            except OSError:  # Windows removes no file that is open, so there it is never the next run's
                lock.release()
                with contextlib.suppress(OSError):
                    held.unlink(missing_ok=True)
    finally:
        for place in missing:
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()


IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY}


def not_written(path: Path, error: Exception) -> OSError:
    """What went wrong while `path` was written, as one sentence with what to do about it."""
    if (number := error_number(error)) in FULL:
        advice = "free some space"
    elif number in IN_THE_WAY:
        advice = "move what has its name away"
    else:
        advice = "see that its folder is writable and that nothing has it open"
    return OSError(f"{path} could not be written ({reason(error)}): {advice} and resume; older checkpoints are whole.")


def reason(error: Exception) -> str:
    """What an error says, as a clause."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200].rstrip(".") or type(error).__name__


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is written, as one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error
