"""Pictures inside archives: `photos.zip/cat.png`, or `shards/000.tar/cat.image.png`, whose archive may be at a URL.

Nothing is unpacked: a picture is read from its place. An archive at a URL is fetched whole, into a temporary file that
no name leads to, and the last `KEPT` stay. So data that no disk holds is read as long as its order goes by archive.
"""

import contextlib
import os
import re
import tarfile
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from ..images import MAX_BYTES, PictureError

TEXT_BYTES = 2**24
"""Longest text that is read: a few bytes of an archive may unpack to a gigabyte of it."""

KEPT = 2
"""Archives at URLs that a process keeps on disk: a batch reads one of them, and that ahead of it the next."""

REMOTE = ("http", "https", "hf", "s3", "gs")
"""What a URL begins with. fsspec fetches it, with the package that it asks for where it needs one."""

_ARCHIVE = re.compile(r"\.(?:zip|tar)(?=/|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Member:
    """A file inside an archive. archive: the path, or the URL, of a .zip, or of a .tar that is not compressed."""

    archive: str
    name: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    @property
    def remote(self) -> bool:
        """Whether the archive is at a URL."""
        return is_remote(self.archive)

    def is_there(self) -> bool:
        """Whether the archive has it. Raises `PictureError` for an archive that cannot be read."""
        with _opened(self.archive) as (_, index):
            return self.name in index

    def read(self, most: int = MAX_BYTES) -> bytes:
        """Its content. Raises `PictureError` where the archive cannot be read or lacks it, or it has more bytes than
        `most`."""
        with _opened(self.archive) as (file, index):
            if self.name not in index:
                raise PictureError(f"{str(self)!r} does not exist; check the name, and what the archive holds")
            offset, size = index[self.name]
            if size > most:
                raise PictureError(f"{str(self)!r} has {size} bytes, and at most {most} are read; leave it out")
            if offset is None:
                with zipfile.ZipFile(file) as archive:
                    return archive.read(self.name)
            file.seek(offset)
            content = file.read(size)
            if len(content) < size:
                raise PictureError(f"{str(self)!r} is cut short; fetch the archive again")
            return content


def is_remote(archive: str) -> bool:
    """Whether an archive is at a URL."""
    return urlsplit(archive).scheme in REMOTE


def find_member(entry: str, folder: Path) -> Member | None:
    """What `entry` names inside an archive; None where no part of it is one. Relative to `folder`."""
    for path in dict.fromkeys((entry, entry.replace("\\", "/"))):
        for found in _ARCHIVE.finditer(path):
            archive, name = path[: found.end()], path[found.end() + 1 :]
            if name and is_remote(archive):
                return Member(archive, name)
            if name and os.path.isfile(folder / archive):
                return Member(str(folder / archive), name)
    return None


def members(archive: str) -> list[Member]:
    """All files of an archive, in its order. Raises `PictureError` for one that cannot be read."""
    with _opened(archive) as (_, index):
        return [Member(archive, name) for name in index]


# Opening --------------------------------------------------------------------------------------------------------------

Index = dict[str, tuple[int | None, int]]
"""Where a file begins, and how many bytes it has; no beginning where it is compressed."""


@contextlib.contextmanager
def _opened(archive: str) -> Iterator[tuple[BinaryIO, Index]]:
    try:
        if is_remote(archive):
            with _turn:
                yield _fetch(archive)
        else:
            status = os.stat(archive)
            index = _index_of(archive, status.st_size, status.st_mtime_ns)
            with open(archive, "rb") as file:
                yield file, index
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f"The archive {archive!r} does not exist; check the name and the folder") from error
    except Exception as error:
        # Readers of archives raise whatever their parsing ran into: OSError, TarError, UnicodeDecodeError, RuntimeError
        # for a password ...
        reason = (str(error) or type(error).__name__).rstrip(".")
        raise PictureError(
            f"The archive {archive!r} cannot be read ({reason}); pack it again, as plain .zip or .tar"
        ) from error


@lru_cache(maxsize=32)
def _index_of(archive: str, size: int, changed: int) -> Index:
    with open(archive, "rb") as file:
        return _read_index(file, archive)


def _read_index(file: BinaryIO, archive: str) -> Index:
    if archive.lower().endswith(".zip"):
        with zipfile.ZipFile(file) as packed:
            return {info.filename: (None, info.file_size) for info in packed.infolist() if not info.is_dir()}
    index: Index = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            if info.islnk() and info.linkname in index:  # a file that is there under another name
                index[info.name] = index[info.linkname]
            elif info.isreg() and not info.issparse():
                index[info.name] = info.offset_data, info.size
        # The library takes a damaged header, and a file that was cut between two, for the end
        file.seek(tar.offset)
        if len(end := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it is cut short")
        while end:
            if end.strip(b"\0"):
                raise tarfile.ReadError(f"its header at byte {tar.offset} is damaged, or another .tar follows there")
            end = file.read(2**20)
    return index


_turn = threading.Lock()
_fetched: OrderedDict[str, tuple[BinaryIO, Index]] = OrderedDict()


def _fetch(archive: str) -> tuple[BinaryIO, Index]:
    """An archive at a URL, on this disk."""
    if archive not in _fetched:
        try:
            import fsspec
        except ImportError as error:
            raise PictureError(f"Fetching {archive!r} needs fsspec; pip install fsspec") from error
        while len(_fetched) >= KEPT:
            _fetched.popitem(last=False)[1][0].close()
        file = tempfile.TemporaryFile()  # no name leads to it, so a process that is killed leaves nothing
        try:
            with fsspec.open(archive, mode="rb") as source:
                while block := source.read(2**20):
                    file.write(block)
            file.seek(0)
            _fetched[archive] = (file, _read_index(file, archive))
        except ImportError as error:  # of what fsspec needs for this kind of URL
            file.close()
            raise PictureError(f"The archive {archive!r} cannot be fetched ({error})") from error
        except Exception as error:  # also kinds of the library that fsspec uses for this kind of URL
            file.close()
            reason = (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(".")
            raise PictureError(
                f"The archive {archive!r} cannot be fetched and read ({reason}); check the address, and that it is a "
                "plain .zip or .tar"
            ) from error
        except BaseException:
            file.close()
            raise
    _fetched.move_to_end(archive)
    return _fetched[archive]


def forget_fetched() -> None:
    """Give back what archives at URLs take on disk. In a forked process, whose files would have their position in
    common with those of its parent, this has happened."""
    global _turn
    _turn = threading.Lock()
    while _fetched:
        _fetched.popitem()[1][0].close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_fetched)
