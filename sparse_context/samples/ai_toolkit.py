"""Data of ai-toolkit: images with a caption beside each, and controls of the same names in folders of their own.

A source is the .yaml of a training, whose data sets are read, or a folder that holds such folders:

    data/target/cat.png  data/target/cat.txt  data/control/cat.jpg  data/control_2/cat.png

There the folder with captions holds the images to be made, whatever it is called, and the others, in the order of their
names, the controls: the references. A caption is the text of that file, or "caption" in a .json; where there is none,
that of default.txt in the same folder.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..texts import once_each
from .layout import Layout, Row, by_number, caption_suffix, folder_of, is_image, read_caption, unused
from .sample import ManifestError

USED = {"folder_path", "dataset_path", "caption_ext", "caption_type", "default_caption", "trigger_word", "mask_path"}
CONTROLS = ("control_path", "control_path_1", "control_path_2", "control_path_3")
"""Settings of a data set that are used; what others say is a training's own, but for these:"""

REFUSED = {
    "control_from_same_folder": "draws its controls at random",
    "is_reg": "is of regularisation",
    "num_frames": "is of videos",
}


def fits(source: str) -> bool:
    """Whether a source is a .yaml file, or a folder as above."""
    path = Path(source)
    if os.path.isfile(source):
        return path.suffix.lower() in (".yaml", ".yml")
    return os.path.isdir(source) and len(_folders(path)) > 1 and bool(_captioned(path))


def read(source: str, columns: Mapping[str, str]) -> Layout:
    """The rows of all data sets, in the order of their names. Raises `ManifestError`."""
    path = Path(source)
    if path.is_file():
        return _read_training(path)
    captioned = _captioned(path)
    if len(captioned) > 1:
        names = " and ".join(folder.name for folder in captioned)
        raise ManifestError(f"{source} has captions in {names}: leave them beside the images to be made alone.")
    controls = [folder for folder in _folders(path) if folder not in captioned]
    return Layout(_rows(captioned[0].absolute(), [folder.absolute() for folder in controls]))


def _folders(path: Path) -> list[Path]:
    folders = [each for each in path.iterdir() if each.is_dir() and not each.name.startswith((".", "_"))]
    found = [each for each in folders if next(_walk(each), None) is not None]
    return sorted(found, key=lambda folder: by_number(folder.name))


def _captioned(path: Path) -> list[Path]:
    return [each for each in _folders(path) if next(each.glob("*.txt"), None) is not None]


def _walk(folder: Path) -> Iterator[Path]:
    """Pictures in a folder and below it, but for hidden folders and those that ai-toolkit makes itself."""
    for place, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if not name.startswith(".") and name != "_controls"]
        yield from (Path(place, name) for name in names if is_image(name))


def _rows(
    folder: Path,
    controls: Sequence[Path],
    caption: str = ".txt",
    default: str | None = None,
    trigger: str | None = None,
    masks: Path | None = None,
) -> list[tuple[str, Row]]:
    """One row for each picture of a folder."""
    listed = [_by_stem(each) for each in controls]
    covers = {} if masks is None else _by_stem(masks)
    rows: list[tuple[str, Row]] = []
    for image in sorted(_walk(folder), key=lambda path: by_number(str(path))):
        there = [image.stem in names for names in listed]
        missing = [each.name for each, is_there in zip(controls, there, strict=True) if not is_there]
        text = _read_caption(image.with_suffix(caption))
        text = text if text is not None else read_caption(image.with_name("default.txt"))
        text = text or (default if default is not None else text)
        where = str(image.relative_to(folder.parent))
        if not controls or len(missing) == len(controls):
            told = f"put one of that name into {missing[0]}" if missing else "name control_path"
            rows.append((where, [f"{where} has no control, which is its reference: {told}."]))
        elif there != sorted(there, reverse=True):  # the pictures after it would move up
            rows.append((where, [f"{where} has no control in {missing[0]}, but in a later folder: put one there."]))
        elif text is None:
            rows.append((where, [f"{where} has no caption: write it into {image.stem}{caption}."]))
        else:
            row: dict[str, object] = {
                "references": [str(names[image.stem]) for names in listed if image.stem in names],
                "image": str(image),
                "prompt": text.replace("[trigger]", trigger) if trigger else text,
            }
            rows.append((where, row | ({"mask": str(covers[image.stem])} if image.stem in covers else {})))
    return rows


def _read_caption(path: Path) -> str | None:
    """The text beside a picture: that of a .json is its "caption"."""
    text = read_caption(path)
    if text is None or path.suffix.lower() != ".json":
        return text
    try:
        record = json.loads(text, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"The caption {path} is no JSON ({error}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("caption"), str):
        raise ManifestError(f'The caption {path} has no text: write {{"caption": "..."}}.')
    return record["caption"].strip()


def _by_stem(folder: Path) -> dict[str, Path]:
    """The pictures in a folder by their names without suffix; of two of one name, the first."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_image(path.name):
            found.setdefault(path.stem, path)
    return found


# The .yaml of a training ----------------------------------------------------------------------------------------------


def _load_once_each(text: str) -> Any:
    """YAML as data alone. A mapping that has a key twice is refused, of which PyYAML takes the last value."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
                name = repr(self.construct_object(key, deep=True))
                if name in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1} has {name[:80]} a second time: write it once")
                seen.add(name)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


def _read_training(path: Path) -> Layout:
    try:
        import yaml
    except ImportError as error:
        raise ManifestError(f"Reading {path} needs PyYAML: pip install pyyaml.") from error
    try:
        record = _load_once_each(path.read_text(encoding="utf-8"))
        processes = [each for each in record["config"]["process"] if each.get("datasets")]
        parts = [(each.get("trigger_word"), part) for each in processes for part in each["datasets"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{path} has no config.process with datasets: pass the .yaml of a training.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: also of a date that is none
        reason = " ".join(str(error).split())
        raise ManifestError(f"{path} cannot be read ({reason}): pass the .yaml of an ai-toolkit training.") from error
    rows: list[tuple[str, Row]] = []
    keys: set[str] = set()
    for i, (trigger, part) in enumerate(parts, start=1):
        where = f"{path}, data set {i}"
        if not isinstance(part, Mapping):
            raise ManifestError(f"{where} is no list of settings: write folder_path and control_path.")
        rows += _read_part(part, trigger, path.parent, where)
        keys |= {str(key) for key, value in part.items() if value not in (None, False, [], "")}
    notes = unused(keys - USED - {*CONTROLS}, str(path))
    if any(part.get("trigger_word") or trigger for trigger, part in parts):
        notes += (f"{path}: the trigger word takes the place of [trigger] in captions, and is added to no other.",)
    return Layout(rows, notes)


def _read_part(part: Mapping[str, Any], trigger: Any, base: Path, where: str) -> list[tuple[str, Row]]:
    for key, what in REFUSED.items():
        if part.get(key) and not (key == "num_frames" and part[key] == 1):
            raise ManifestError(f"{where} has {key}, so it {what}, which is not supported: leave it out.")
    default, trigger = part.get("default_caption"), part.get("trigger_word") or trigger
    for key, entry in (("default_caption", default), ("trigger_word", trigger)):
        if entry is not None and not isinstance(entry, str):
            raise ManifestError(f"{where}: {key} is {entry!r}: write text, in quotes.")
    named = [part.get(key) for key in CONTROLS]
    entries = [entry for each in named if each for entry in (each if isinstance(each, list) else [each])]
    caption = part.get("caption_ext") or part.get("caption_type") or "txt"
    masks = part.get("mask_path")
    return _rows(
        folder_of(part.get("dataset_path") or part.get("folder_path"), base, where),
        [folder_of(entry, base, where) for entry in entries],
        caption_suffix(caption, where),
        default,
        trigger,
        folder_of(masks, base, where) if masks else None,
    )
