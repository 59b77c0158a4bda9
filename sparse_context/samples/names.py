"""Names of samples, which files are called by: what no file can have on some system, and what two files share."""

import re
import unicodedata
from collections.abc import Iterable

DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(f"{kind}{i}" for kind in ("com", "lpt") for i in "0123456789¹²³"),
}
"""What Windows opens in the place of a file, whatever comes after a dot."""

ILLEGAL = r'[/\\\x00-\x1f<>:"|?*]'
"""Characters that a file's name has not, on one system or another."""

LONGEST_NAME = 200  # bytes: file systems have 255, and a file that is being written has a longer one


def name_problem(name: str) -> str | None:
    """What to do about a sample's name that no file can have on some system; None where all is well."""
    if not name.strip() or name in (".", ".."):
        return "write letters"
    if re.search(ILLEGAL, name):
        return 'leave out slashes, line ends and < > : " | ? *'
    if name[-1] in ". ":
        return "leave out the dot or space at its end"
    if name.split(".")[0].rstrip().casefold() in DEVICES:
        return "choose another, for Windows has a device of that name"
    return None


def same_file(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that are those of one file on some system: Windows and macOS tell no capitals apart, and
    macOS no ways to write an accent."""
    found: dict[str, str] = {}
    for name in names:
        if file_key(name) in found:
            return found[file_key(name)], name
        found[file_key(name)] = name
    return None


def file_key(name: str) -> str:
    """Equal for names that are one file on some system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
