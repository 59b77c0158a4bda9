"""From a folder, a file or a name of the hub to the class of a pipeline, before anything is loaded."""

import contextlib
import json
import re
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..families import FAMILIES

INDEXES = ("model_index.json", "modular_model_index.json")


KLEIN, KLEIN_KV = "Flux2KleinPipeline", "Flux2KleinKVPipeline"


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


HUB_TIMEOUT = 10  # seconds until the hub counts as out of reach


PATIENCE = 2.0  # seconds until one wants to know what is waited for


@contextlib.contextmanager
def clock(what: str) -> Iterator[None]:
    """On a terminal, say after a while (`PATIENCE`) what is waited for, and for how long; nothing of it stays.

    For the command line, which hides diffusers' own bars: they stay, and what is wrong is to be one sentence there.
    """
    from diffusers.utils.logging import is_progress_bar_enabled

    if is_progress_bar_enabled() or not sys.stderr.isatty():
        yield
        return
    done, start = threading.Event(), time.time()

    def tick() -> None:
        if done.wait(PATIENCE):
            return
        with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False) as bar:  # which makes room for downloads
            bar.start_t = start
            while not done.wait(PATIENCE / 4):
                bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def class_name_of(model: str) -> str:
    """The pipeline class that the index of a folder or hub id names, if it is supported."""
    folder = Path(model)
    if folder.is_dir():
        index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
        if index is None:
            raise ValueError(f"The folder {model} holds no {INDEXES[0]}: pass a model in the diffusers layout.")
    elif HUB_ID.fullmatch(model) and not folder.exists() and not folder.is_symlink():
        index = _fetch_index(model)
    elif folder.name in INDEXES and folder.is_file():
        raise ValueError(f"The model {model} is a file, the index of a model: pass the folder that holds it.")
    elif folder.is_file():
        raise ValueError(
            f"The model {model} is a single file, not a pipeline: pass a folder in the diffusers layout or a hub id."
        )
    elif folder.exists() or folder.is_symlink():
        raise ValueError(
            f"The model {model} is {'neither a folder nor a file' if folder.exists() else 'a link to nothing'}: pass a "
            "folder in the diffusers layout or a hub id."
        )
    else:
        raise ValueError(f"The model {model} does not exist: pass a folder in the diffusers layout or a hub id.")
    try:
        name = str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{index} is not a diffusers model index: pass a model in the diffusers layout.") from error
    if name not in FAMILIES:
        raise ValueError(f"The model {model} is a {name}; the supported pipelines are {', '.join(FAMILIES)}.")
    return name


def _fetch_index(model: str) -> Path:
    """The index of a hub id, of either kind: from the cache if it is there, else from the hub."""
    from huggingface_hub import errors, hf_hub_download, model_info

    reasons = {
        errors.GatedRepoError: "accept its terms there first, and log in with `hf auth login`",
        errors.RepositoryNotFoundError: "no model has this name, or it is private: log in with `hf auth login`",
        errors.EntryNotFoundError: "it has no model_index.json there",
        errors.HFValidationError: "that is not a valid model id",
    }
    try:
        for name in INDEXES:
            try:
                return Path(hf_hub_download(model, name, local_files_only=True))
            except errors.LocalEntryNotFoundError:
                continue
        model_info(model, timeout=HUB_TIMEOUT)  # hf_hub_download would try for half a minute when offline
        try:
            return Path(hf_hub_download(model, INDEXES[0]))
        except errors.EntryNotFoundError:
            return Path(hf_hub_download(model, INDEXES[1]))
    except Exception as error:  # also kinds of the HTTP library that the client happens to use
        other = one_line(error)
        if not isinstance(error, errors.HfHubHTTPError):
            other = f"it cannot be reached, check the connection ({other})"
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), other)
        raise ValueError(
            f"The model {model} is not a local folder, and the hub does not provide it: {reason}."
        ) from error


def one_line(error: BaseException | None) -> str:
    """What an error says, on one line and shortened, without its full stop; its kind where it says nothing."""
    text = textwrap.shorten(str(error), 300, placeholder=" …")
    return text.rstrip(".!") or type(error).__name__
