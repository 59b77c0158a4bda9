"""The objects and photographs of the scenes: where they come from, and how they are split."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from tiny_scenes import save_assets

from recipes.mini.data import (
    SHA256,
    SPLITS,
    clip_art_key,
    crop_to_square,
    emoji_key,
    fetch,
    free_files,
    load_assets,
    misses_a_link,
    split_of,
)

README = """The pictures of this activity

Public domain, https://example.org/a
Files: monument.webp
  gate.jpg

License: CC-BY 4.0, by someone; the frame is public domain
Files: castle.webp

CC0
Files: bridge.avif

GFDL
Files: tower.webp
"""


def test_only_photographs_that_are_free_are_taken():
    assert free_files(README) == ["monument.webp", "gate.jpg", "bridge.avif"]
    assert free_files("Files: of-nobody.webp") == []


def test_a_package_is_fetched_once_and_checked_each_time(tmp_path, monkeypatch):
    """By a client of the same name, for the registry is not there in a test."""
    file, content = "openmoji-17.0.0.tgz", b"what the registry has"
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/calls\nprintf '{content.decode()}' > {file}\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(client.parent), prepend=":")
    packages = tmp_path / "packages"
    with pytest.raises(RuntimeError, match="has SHA-256 .* it is another version than openmoji@17.0.0, or damaged"):
        fetch(packages, file)
    monkeypatch.setitem(SHA256, file, hashlib.sha256(content).hexdigest())
    assert fetch(packages, file).read_bytes() == content
    assert (tmp_path / "calls").read_text() == "pack --silent openmoji@17.0.0\n"  # that of the first time
    assert [path.name for path in packages.iterdir()] == [file]


def test_a_client_that_fails_leaves_nothing_and_says_where_the_package_belongs(tmp_path, monkeypatch):
    for status in (None, 1):
        if status is not None:
            client = tmp_path / "bin" / "npm"
            client.parent.mkdir()
            client.write_text(f"#!/bin/sh\nprintf half > openmoji-17.0.0.tgz\nexit {status}\n")
            client.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin") + (":/usr/bin:/bin" if status else ""))
        place = re.escape(str(tmp_path / "packages" / "openmoji-17.0.0.tgz"))
        with pytest.raises(
            RuntimeError, match=f"`npm pack .* failed; fetch the package another way and put it at {place}"
        ):
            fetch(tmp_path / "packages", "openmoji-17.0.0.tgz")
        assert not [*(tmp_path / "packages").iterdir()]


def test_splits_are_disjoint_and_by_name(assets):
    assert [assets.split(name).object_names for name in ("train", "validation", "test")] == [
        ["disc"],
        ["bar"],
        ["ring"],
    ]
    assert [len(assets.split(name).photos) for name in SPLITS] == [1, 1, 0]
    assert np.array_equal(assets.split("validation").photos[0], assets.photos[1])
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        assets.split("dev")
    assert split_of("face") == split_of("clock") == 0
    trained = replace(assets, object_names=["Red disc 01", "a ring", "barrow"])
    unlike = assets.unlike(trained)  # "a" is no word, and "bar" not that of the barrow
    assert unlike.object_names == ["bar"] and np.array_equal(unlike.objects, assets.split("validation").objects)
    assert unlike.object_split.tolist() == [1] and np.array_equal(unlike.photos, assets.photos)
    shares = np.bincount([split_of(f"shape {i}") for i in range(4000)], minlength=3) / 4000
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.02


@pytest.mark.parametrize(
    "name, group, subgroup, key, split",
    [
        ("woman running", "people-body", "person-activity", "person", "train"),
        ("waving hand", "people-body", "hand-fingers-open", "hand", "train"),
        ("women’s room", "symbols", "transport-sign", "symbol", "train"),
        ("END arrow", "symbols", "arrow", "symbol", "train"),
        ("grinning face", "smileys-emotion", "face-smiling", "face", "train"),
        ("heart with arrow", "smileys-emotion", "heart", "heart", "train"),
        ("hourglass done", "travel-places", "time", "clock", "train"),
        ("woman’s hat", "objects", "clothing", "hat", "train"),
        ("white flower", "animals-nature", "plant-flower", "flower", "train"),
        ("red apple", "food-drink", "food-fruit", "apple", "validation"),
        ("deciduous tree", "animals-nature", "plant-other", "tree", "test"),
        ("locked with key", "objects", "lock", "key", "test"),
    ],
)
def test_emoji_are_split_by_the_last_word_or_their_group(name, group, subgroup, key, split):
    entry = {"annotation": name, "group": group, "subgroups": subgroup}
    assert (emoji_key(entry), SPLITS[split_of(key)]) == (key, split)


@pytest.mark.parametrize(
    "name, key, split",
    [
        ("a_man_singing_01", "man", "validation"),  # words of three letters or more count
        ("woman01", "woman", "test"),  # as an emoji both are persons, which are trained on
        ("another_apple_01", "another", "train"),
        ("apple_bw", "apple", "validation"),
        ("plain_tree_01", "plain", "train"),
        ("tree_02", "tree", "test"),
        ("keyboard_key_yemu", "keyboard", "train"),
        ("key_enter", "key", "test"),
        ("flower_01", "flower", "train"),
        ("red_flower_01", "red", "test"),
        ("blue_fedora", "blue", "train"),
        ("red_fedora", "red", "test"),  # the same drawing
        ("Smiling_cat", "face", "train"),
        ("broken_heart_01", "heart", "train"),
        ("01", "symbol", "train"),
    ],
)
def test_clip_art_is_split_by_the_first_word(name, key, split):
    assert (clip_art_key(name), SPLITS[split_of(key)]) == (key, split)


def test_objects_are_cropped_to_their_alpha():
    rgba = np.zeros((300, 200, 4), np.uint8)
    rgba[40:240, 60:160] = [10, 200, 30, 255]
    square = crop_to_square(rgba)
    rows, columns = np.nonzero(square[..., 3])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 127, 32, 95)
    assert (square[64, 64] == [10, 200, 30, 255]).all()
    assert crop_to_square(np.full((64, 64, 4), 255, np.uint8)) is None  # nothing is transparent: no outline


def test_clip_art_with_a_card_that_says_link_not_found_is_no_object():
    rgba = np.zeros((128, 128, 4), np.uint8)
    rgba[30:100, 30:100] = [90, 140, 60, 255]
    assert not misses_a_link(rgba)
    rgba[40:90, 40:90] = [255, 255, 255, 143]
    assert not misses_a_link(rgba)  # glass, perhaps
    rgba[45:55, 60:70] = [255, 0, 0, 143]
    assert misses_a_link(rgba)


def test_a_file_that_is_no_assets_is_one_sentence(assets, tmp_path):
    save_assets(assets, tmp_path)
    file = tmp_path / "assets.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], b"", whole.replace(b'"names"', b'"mames"')):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))} is no file of assets, or damaged .*: delete it"):
            load_assets(file)
