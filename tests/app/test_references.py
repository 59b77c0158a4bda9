"""Files that are uploaded, and what is painted on pictures."""

import asyncio

import gradio as gr
import numpy as np
import pytest
from cli.conftest import png_header
from PIL import Image
from tiny import picture

from app.conftest import in_a_loop
from sparse_context.app.references import (
    CANVAS,
    apart,
    from_canvas,
    load_files,
    take_paths,
    take_uploads_only,
    to_canvas,
)
from sparse_context.app.sessions import Loaded
from sparse_context.selectors.masks import DROP, KEEP, NEITHER


def test_pictures_of_one_name_are_told_apart():
    image = Image.new("RGB", (8, 8))
    names = [each.name for each in apart([Loaded(name, image) for name in ("a.png", "a.png", "b.png", "a.png")])]
    assert names == ["a.png", "a (2).png", "b.png", "a (3).png"]


def upload(folder, name, data):
    """A file as Gradio leaves it: in a folder of its own."""
    (folder / name.replace(".", "")).mkdir()
    path = folder / name.replace(".", "") / name
    path.write_bytes(data)
    return str(path)


def test_uploads_are_read_and_deleted(tmp_path):
    picture(96, 64).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    (tmp_path / "good.png").unlink()
    paths = [
        upload(tmp_path, "cat.png", good),
        upload(tmp_path, "broken.png", good[:200]),
        upload(tmp_path, "empty.jpg", b""),
        upload(tmp_path, "bomb.png", png_header(60_000, 60_000)),
        upload(tmp_path, "page.svg", b"<svg onload='alert(1)'/>"),
    ]
    loaded, problems, left = load_files(paths, 10)
    assert left == 0
    assert [each.name for each in loaded] == ["cat.png"]
    assert np.array_equal(np.asarray(loaded[0].picture), np.asarray(picture(96, 64)))
    assert [problem.split(" ")[0] for problem in problems] == [
        "'broken.png'",
        "'empty.jpg'",
        "'bomb.png'",
        "'page.svg'",
    ]
    assert not any(str(tmp_path) in problem for problem in problems)
    assert all(problem.endswith(".") and problem.count(". ") == 0 for problem in problems)
    assert list(tmp_path.iterdir()) == []


def test_uploads_beyond_the_room_are_deleted_without_a_look(tmp_path):
    paths = [upload(tmp_path, f"{i}.png", png_header(60_000, 60_000)) for i in range(3)]
    assert load_files(paths, 0) == ([], [], 3) and list(tmp_path.iterdir()) == []


def test_an_upload_that_is_gone_is_said():
    loaded, problems, left = load_files(["/nowhere/cat.png"], 10)
    assert loaded == [] and left == 0 and problems[0].startswith("'cat.png' ")


@pytest.mark.parametrize("size", [(64, 64), (1200, 300), (31, 700)])
def test_what_is_painted_comes_back_from_the_canvas(size):
    mask = np.full((size[1], size[0]), NEITHER, np.uint8)
    mask[: size[1] // 2, : size[0] // 2], mask[size[1] // 2 :, size[0] // 2 :] = KEEP, DROP
    canvas = to_canvas(Loaded("cat.png", picture(*size), mask))
    assert max(canvas["background"].size) == CANVAS
    assert canvas["layers"][0].size == canvas["background"].size
    again = from_canvas(canvas, size)
    assert again.shape == mask.shape
    assert (again != mask).mean() < 0.02  # where the canvas is smaller, edges move by less than its pixel


def test_of_strokes_over_one_another_the_last_one_counts():
    layer = Image.new("RGBA", (64, 64))
    for colour in ((46, 160, 90, 153), (214, 62, 62, 153)):
        layer = Image.alpha_composite(layer, Image.new("RGBA", (64, 64), colour))
    assert (from_canvas({"layers": [layer]}, (64, 64)) == DROP).all()
    layer = Image.alpha_composite(layer, Image.new("RGBA", (64, 64), (46, 160, 90, 153)))
    assert (from_canvas({"layers": [layer]}, (64, 64)) == KEEP).all()


@pytest.mark.parametrize("value", [None, {}, {"layers": None}, {"layers": [Image.new("RGBA", (8, 8))]}])
def test_nothing_is_painted(value):
    assert from_canvas(value, (64, 64)) is None


def test_transparent_parts_are_white_below_the_brush():
    cut_out = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert to_canvas(Loaded("cat.png", cut_out))["background"].getpixel((0, 0)) == (255, 255, 255)


def test_a_page_cannot_name_an_address_in_place_of_a_file():
    files = in_a_loop(gr.File)
    take_uploads_only(files)
    take_paths(files)
    with pytest.raises(ValueError, match="^Upload an image as a file: addresses are not fetched.$"):
        asyncio.run(files.async_move_resource_to_block_cache("http://127.0.0.1:9/cat.png"))
    assert files.preprocess(None) == []
