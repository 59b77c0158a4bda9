"""The pictures that nothing is trained on: what is taken out of the two packages."""

import hashlib
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from recipes.mini.cutouts import build_cutouts
from recipes.mini.data import CUTOUTS, PACKAGES, SHA256, load_assets
from recipes.mini.scenes import background, make_scene


def write_package(folder, file, pictures):
    """A Debian package of pictures by their paths, where `fetch` finds it."""
    tree = folder / file.removesuffix(".deb")
    control = tree / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text("Package: pictures\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: pictures\n")
    for path, picture in pictures.items():
        place = tree / "usr" / "share" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)
    subprocess.run(["dpkg-deb", "--build", str(tree), str(folder / file)], check=True, capture_output=True)


def stamp(colour, side=160):
    picture = Image.new("RGBA", (side, side))
    picture.paste((*colour, 255), (10, 10, side - 10, side - 10))
    return picture


@pytest.fixture
def packages(tmp_path, monkeypatch):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("without dpkg-deb no Debian package can be made or opened")
    stamps = {
        "tuxpaint/stamps/animals/birds/grey_crow.png": stamp((90, 90, 90)),
        "tuxpaint/stamps/food/fruit/kiwi.png": stamp((10, 120, 20)),
        "tuxpaint/stamps/food/pizza.png": stamp((200, 0, 0)),  # drawn, as the name tells
        "tuxpaint/stamps/food/fruit/cartoon/cherry.png": stamp((220, 0, 0)),
        "tuxpaint/stamps/animals/ant.png": stamp((0, 0, 0), side=100),  # too small
        "tuxpaint/stamps/plants/whole.png": Image.new("RGBA", (160, 160), (0, 90, 0, 255)),  # no outline
        "tuxpaint/stamps/symbols/one.png": stamp((250, 250, 0)),
    }
    wide = Image.new("RGB", (608, 304), (200, 20, 20))
    wide.paste((20, 20, 200), (304, 0, 608, 304))
    wallpapers = {
        "backgrounds/hill_by_somebody.jpg": wide,
        "backgrounds/friends_by_somebody.jpg": Image.new("RGB", (400, 400), (0, 255, 0)),  # dogs, which are objects
    }
    for file, pictures in zip(CUTOUTS, (stamps, wallpapers), strict=True):
        write_package(tmp_path, file, pictures)
        monkeypatch.setitem(SHA256, file, hashlib.sha256((tmp_path / file).read_bytes()).hexdigest())
    return tmp_path


def test_photographs_that_were_cut_out_are_taken_and_all_are_to_be_tested_on(packages):
    build_cutouts(packages, packages / "cutouts.safetensors")
    assets = load_assets(packages / "cutouts.safetensors")
    assert assets.object_names == ["grey crow", "kiwi"]
    assert [tuple(rgba[64, 64]) for rgba in assets.objects] == [(90, 90, 90, 255), (10, 120, 20, 255)]
    red, blue = (square[16:-16, 16:-16].astype(int) for square in assets.photos)  # JPEG mixes colours at the seam
    assert np.abs(red - [200, 20, 20]).max() < 8 and np.abs(blue - [20, 20, 200]).max() < 8  # both ends
    assert len(assets.split("test").objects) == len(assets.split("test").photos) == 2
    assert [len(assets.split(name).objects) for name in ("train", "validation")] == [0, 0]


def test_their_backgrounds_are_photographs_alone(packages, assets):
    held_out = build_cutouts(packages, packages / "cutouts.safetensors").split("test")
    for pictures in (held_out, held_out.without_objects(), load_assets(packages / "cutouts.safetensors")):
        plain = [background(pictures, np.random.default_rng(seed)).std((0, 1)).max() < 0.05 for seed in range(20)]
        assert all(plain)  # the two photographs are plain, and a texture is not
    assert assets.photographs == 0.6
    assert make_scene(held_out, "edit_named", 1).target.shape == (128, 128, 3)


def test_nothing_is_trained_on_these_packages():
    assert set(CUTOUTS) < set(PACKAGES) and len(CUTOUTS) == 2


def test_a_missing_file_names_its_command(tmp_path):
    for name, command in (("cutouts", "cutouts"), ("assets", "data")):
        with pytest.raises(FileNotFoundError, match=f"make it with `python -m recipes.mini {command}`"):
            load_assets(tmp_path / f"{name}.safetensors")
