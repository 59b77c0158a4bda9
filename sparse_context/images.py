"""Reading and writing pictures so that bad input ends in one sentence and good output is never half written.

Every face reads through `open_picture` and `open_mask` and writes through `save_picture`. What comes in may be any of
the odd kinds that users have (16-bit, CMYK, palette, animated, rotated by EXIF); what comes out is always 8-bit RGB, or
RGBA where something in the picture is transparent. What goes wrong is a `PictureError` that names the file and says
what to do.
"""

import contextlib
import errno
import io
import os
import re
import secrets
import stat
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded; its header is asked before any memory is taken."""

MAX_BYTES = 2**30
"""Largest file that is opened: 100 megapixels of uncompressed 16-bit RGBA are 0.8 GB."""

READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# By suffix: Pillow's name, the options to write with, and the format's own limit on a side in pixels.
WRITE_FORMATS: dict[str, tuple[str, dict[str, object], int]] = {
    ".png": ("PNG", {}, 2**31 - 1),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}, 65_500),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}, 65_500),
    ".webp": ("WEBP", {"quality": 95}, 16_383),
}

# Pillow warns about oddities that whoever runs a command can do nothing about. The filters of the `warnings` module
# are global, so threads take turns.
_quiet = threading.Lock()


class PictureError(ValueError):
    """A picture cannot be read or written. The message is one sentence that names the file and says what to do."""


def open_picture(
    path: str | os.PathLike[str] | bytes, most_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """The first frame of a picture file, or of its bytes, upright, in sRGB with 8 bits a channel.

    name: what messages call it; by default its path.

    Returns mode RGBA where at least one pixel is transparent to some degree (alpha channel, palette, tRNS), else RGB.
    16-bit values are scaled by their high byte. Wider integers and floats state no range of their own: floats within
    [0, 1] and integers within [0, 255] or [0, 65535] are read as such, and anything else is stretched from its smallest
    value to its largest. A colour profile is converted to sRGB where it can be, else ignored.

    Raises `PictureError` for a file that is missing, unreadable, not a picture in one of `READ_FORMATS`, damaged, or
    larger than `most_pixels` or `MAX_BYTES`.
    """
    with _opened(path, most_pixels, name) as image:
        return _upright_8bit(image)


def picture_size(path: str | os.PathLike[str] | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height in pixels of a picture as `open_picture` would give it, of which only the header is read.

    Raises `PictureError` as that does, but for what is wrong behind the header.
    """
    with _opened(path, MAX_PIXELS, name) as image:
        width, height = image.size
        turned = _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"  # whose size Pillow has turned already
        return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> int:
    """What the EXIF block says, or 1 where that is damaged, which `open_picture` lets pass too."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's parser raises whatever it ran into
        return 1


def open_mask(
    path: str | os.PathLike[str] | bytes, size: tuple[int, int], most_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """A mask as mode L, 255 where to keep: the file's alpha if anything in it is transparent, else its luminance.

    `size` is the `(width, height)`, in pixels, of the picture it belongs to, as `open_picture` returned it. Raises
    `PictureError` as `open_picture` does, and for a mask of another size. name: as in `open_picture`.
    """
    mask = open_picture(path, most_pixels, name)
    if mask.size != tuple(size):
        name = name or ("in the data" if isinstance(path, bytes) else _name(path))
        raise PictureError(
            f"the mask {name} has {mask.width}x{mask.height} pixels but its picture has {size[0]}x{size[1]}; "
            "resize the mask to the picture"
        )
    return mask.getchannel("A") if mask.mode == "RGBA" else mask.convert("L")


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str] | bytes, most_pixels: int, name: str | None) -> Iterator[Image.Image]:
    """A picture that is not decoded yet."""
    if name is None:
        name = f"a picture of {len(path)} bytes" if isinstance(path, bytes) else _name(path)
    with (
        _open_bytes(path, name) if isinstance(path, bytes) else _open_file(path, name) as file,
        _quiet,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        formats = [format for format in READ_FORMATS if format != "AVIF" or features.check("avif")]
        try:
            with Image.open(file, formats=formats) as image:
                width, height = image.size
                if width * height > most_pixels:
                    raise PictureError(_too_large(name, f"{width}x{height} pixels", most_pixels))
                yield image
        except PictureError:
            raise
        except UnidentifiedImageError:
            raise PictureError(
                f"{name} is not a picture that can be read, or its first bytes are damaged; "
                f"give one of {', '.join(formats)}"
            ) from None
        except Image.DecompressionBombError:
            raise PictureError(_too_large(name, "as its header says", most_pixels)) from None
        except MemoryError:
            raise PictureError(f"{name} does not fit into memory; scale it down first") from None
        except Exception as error:
            # Pillow's readers raise whatever their parsing ran into: OSError, SyntaxError, struct.error, KeyError ...
            raise PictureError(
                f"{name} is damaged or cut short ({_reason(error)}); export it again or use another copy"
            ) from error


def check_output(path: str | os.PathLike[str]) -> None:
    """Say before any work starts whether `save_picture` could write here; leaves nothing behind.

    Raises `PictureError` for an unknown suffix, and what `check_file` raises.
    """
    _write_format(path)
    check_file(path)


def check_file(path: str | os.PathLike[str]) -> None:
    """Say before any work starts whether a file could be written here; leaves nothing behind.

    Raises `PictureError` for a folder that is missing or not writable, and a path that is a folder, not a plain file,
    or write-protected.
    """
    name = _name(path)
    target = _target(path, name)
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        raise PictureError(f"{name} is a folder; give the name of a file inside it")
    if not os.path.isdir(folder):
        raise PictureError(f"{name} cannot be written: the folder {_name(folder)} does not exist; make it first")
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(target).st_mode):  # raises for a name that is too long, too
                raise PictureError(f"{name} exists and is not a plain file; choose another name")
            open(target, "ab").close()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PictureError(f"{name} cannot be written ({_reason(error)}); choose another place") from error


def save_picture(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture whole or not at all, in the format that the suffix names (.png, .jpg, .jpeg or .webp).

    An older file stays as it was until the new one is complete. JPEG has no transparency: it is laid on white. Raises
    `PictureError` when it cannot be written.
    """
    name = _name(path)
    format, options, longest = _write_format(path)
    if max(image.size) > longest:
        raise PictureError(f"{name} cannot hold {image.width}x{image.height} pixels; write a .png instead")
    if image.mode not in ("L", "RGB", "RGBA"):
        image = _upright_8bit(image)
    if format == "JPEG" and image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    _write_whole(path, lambda file: image.save(file, format=format, **options))


def save_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises `PictureError` when it cannot be written.

    What UTF-8 cannot hold (a file name that is not Unicode) becomes a backslash escape, which JSON reads back.
    """
    save_bytes(text.encode("utf-8", "backslashreplace"), path)


def save_bytes(data: bytes, path: str | os.PathLike[str]) -> None:
    """Write a file, whole or not at all. Raises `PictureError` when it cannot be written."""
    _write_whole(path, lambda file: file.write(data))


def follow_folder(path: str | os.PathLike[str]) -> None:
    """Let those read a file, or the files in a folder, who may read the folder that it is in: safetensors' own are
    private, whatever the umask says."""
    path = Path(path)
    mode = path.parent.stat().st_mode & 0o666
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with contextlib.suppress(OSError):  # a file system without modes
                file.chmod(mode)


FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC), 112}
"""Of a disk, a quota or a limit that is reached; 112 is Windows' own number, which safetensors tells."""


def error_number(error: BaseException) -> int | None:
    """The system's number of what went wrong; safetensors has it in its text alone."""
    told = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) or (int(told[1]) if told else None)


def put_in_place(new: str | os.PathLike[str], place: str | os.PathLike[str]) -> None:
    """`os.replace`. Windows refuses it while a viewer or a virus scanner has a file of it open, most for a moment: so
    it is tried for a second before PermissionError is raised."""
    for pause in (0.05, 0.15, 0.3, 0.5):
        try:
            return os.replace(new, place)
        except PermissionError:
            time.sleep(pause)
    os.replace(new, place)


def _write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file in the same folder, then put it in the place of `path` in one step."""
    name = _name(path)
    target = _target(path, name)
    part = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.part")
    try:
        # Not tempfile, whose files are private: a new file follows the umask, a replaced one keeps its mode.
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with open(descriptor, "w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if os.path.exists(target):
                with contextlib.suppress(OSError):  # a file system without modes
                    os.chmod(part, stat.S_IMODE(os.stat(target).st_mode))
            put_in_place(part, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
    except (OSError, ValueError) as error:
        advice = "free some space" if error_number(error) in FULL else "choose another place"
        if isinstance(error, PermissionError) and os.path.exists(target):
            advice = "close what has it open, or choose another place"
        raise PictureError(f"{name} could not be written ({_reason(error)}); {advice}") from error


def _open_bytes(data: bytes, name: str) -> io.BytesIO:
    if len(data) > MAX_BYTES:
        raise PictureError(_too_large(name, f"{len(data) / 2**20:.0f} MiB"))
    return io.BytesIO(data)


def _open_file(path: str | os.PathLike[str], name: str) -> io.BufferedReader:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise PictureError(f"{name} is a folder; give a picture file inside it")
        if not stat.S_ISREG(status.st_mode):
            raise PictureError(f"{name} is not a plain file; save the picture to a file first")
        if status.st_size == 0:
            raise PictureError(f"{name} is empty; use another copy")
        if status.st_size > MAX_BYTES:
            raise PictureError(_too_large(name, f"{status.st_size / 2**20:.0f} MiB"))
        return open(path, "rb")
    except FileNotFoundError:
        raise PictureError(f"{name} does not exist; check the name and the folder") from None
    except PermissionError:
        raise PictureError(f"{name} may not be read; check its permissions") from None
    except PictureError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise PictureError(f"{name} cannot be opened ({_reason(error)}); check the name") from error


def _upright_8bit(image: Image.Image) -> Image.Image:
    """Decode, turn upright, convert to sRGB in 8 bits: RGBA where something is transparent, else RGB; no metadata."""
    kind, wide = image.format, _is_16bit_rgb(image)
    with _silent_stderr() if kind == "TIFF" else contextlib.nullcontext():
        image.load()
    if wide and isinstance(image.info.get("transparency"), tuple):
        # Pillow keeps the high byte of each channel but all 16 bits of the colour that stands for transparent.
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    profile = image.info.get("icc_profile")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata raises anything; the pixels are fine
        pass

    alpha = None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if isinstance(image.info.get("transparency"), int):
            alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        image = Image.fromarray(_grey_8bit(values, sixteen=image.mode.startswith("I;16") or kind == "PPM"))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")

    # A new image from bare pixels: Pillow's `info` would carry the profile, now applied, into whatever is saved.
    picture = _srgb(image, profile)
    picture.info = {}
    if alpha is not None and np.asarray(alpha).min() < 255:
        picture.putalpha(alpha)
    return picture


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """libtiff writes its complaints straight to file descriptor 2, past Python, before Pillow raises its error."""
    try:
        kept = os.dup(2)
    except OSError:  # started without one, as programs with windows are on Windows
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _is_16bit_rgb(image: Image.Image) -> bool:
    """Whether a file that is open but not loaded stores RGB with 16 bits a channel, which its mode does not tell."""
    tiles = getattr(image, "tile", None) or []
    return any("RGB;16" in str(tile[3]) for tile in tiles)


def _grey_8bit(values: np.ndarray, sixteen: bool) -> np.ndarray:
    """Grey values of any width as `uint8`, by the rules in `open_picture`; `sixteen` where 16 bits are certain."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
        low, high = values.min(), values.max()
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        elif low >= 0 and high <= 255:
            low, high = 0.0, 255.0
    else:
        values = values.astype(np.int64)
        low, high = values.min(), values.max()
        if low >= 0 and high <= 255 and not sixteen:
            return values.astype(np.uint8)
        if low >= 0 and high <= 65535:
            return (values >> 8).astype(np.uint8)
    if high == low:
        return np.zeros(values.shape, np.uint8)
    return np.round((values - low) * (255.0 / (high - low))).astype(np.uint8)


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A new RGB image; `profile` is the file's colour profile, applied if it fits the colours that are there."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            described = "srgb" in (source.profile.profile_description or "").lower()
            coloured = image.convert("RGB") if space == "RGB" else image
            if {"RGB": "RGB", "CMYK": "CMYK", "GRAY": "L"}.get(space) == coloured.mode and not described:
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(coloured, source, target, outputMode="RGB")
                assert converted is not None  # None only when asked to convert in place
                return converted
        except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
            pass  # a damaged profile says nothing about the pixels
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _write_format(path: str | os.PathLike[str]) -> tuple[str, dict[str, object], int]:
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix.lower() not in WRITE_FORMATS:
        raise PictureError(
            f"{_name(path)} does not end in the name of a picture format that can be written; end it in "
            f"{', '.join(WRITE_FORMATS)}"
        )
    return WRITE_FORMATS[suffix.lower()]


def _target(path: str | os.PathLike[str], name: str) -> str:
    """The file that writing changes: a link stays a link."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise PictureError(f"{name} cannot be written ({_reason(error)}); choose another name") from error


def _too_large(name: str, what: str, most_pixels: int = MAX_PIXELS) -> str:
    limits = f"{most_pixels / 10**6:g} megapixels and {MAX_BYTES // 2**20} MiB"
    return f"{name} is too large ({what}): at most {limits} are read; scale it down first"


def _name(path: str | os.PathLike[str]) -> str:
    """A path in quotes on one line, whatever its characters."""
    return repr(os.fspath(path))


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")
