"""A look at data before a training: what is drawn, and which images two sets share."""

import json

import numpy as np
from PIL import Image, ImageOps
from tiny import picture

from sparse_context.samples import read_samples
from sparse_context.training.check_data import DRAWS, HEIGHT, draw_sheet, find_duplicates
from sparse_context.training.dropping import Dropping


def write(folder, name, *rows):
    (folder / name).write_text("\n".join(json.dumps({"prompt": "x", **row}) for row in rows))
    return read_samples(folder / name)


def test_the_sheet_shows_targets_and_what_batches_keep(tmp_path):
    picture(128, 64, 1).save(tmp_path / "target.png")
    Image.new("RGB", (64, 64), (250, 30, 30)).save(tmp_path / "red.png")
    samples = write(tmp_path, "m.jsonl", {"references": ["red.png"], "image": "target.png"})
    dropping = Dropping(keep_min=0.25, keep_max=0.25, dense=0, mix={"random": 1}, coverage=(0,))
    sheet = draw_sheet(samples, dropping, resolution=512, reference_resolution=512, token=8)
    assert sheet.width == 2 * HEIGHT + DRAWS * (HEIGHT + 16)
    row = np.asarray(sheet)[:HEIGHT].astype(int)
    shown = np.asarray(picture(128, 64, 1).resize((2 * HEIGHT, HEIGHT), Image.Resampling.LANCZOS), int)
    assert np.array_equal(row[:, : 2 * HEIGHT], shown)
    for draw in range(DRAWS):
        left = 2 * HEIGHT + 16 + draw * (HEIGHT + 16)
        step = HEIGHT // 8
        middles = row[step // 2 :: step, left + step // 2 : left + HEIGHT : step]
        assert (middles[..., 0] - middles[..., 1] > 150).sum() == 16  # a quarter of 64 tokens in their own red


def test_a_copy_in_another_size_and_format_is_found_and_a_reference_of_both_is_not(tmp_path):
    for seed, name in enumerate(("a", "b", "c", "d", "room")):
        picture(128, 96, seed).save(tmp_path / f"{name}.png")
    picture(128, 96, 0).resize((96, 72), Image.Resampling.LANCZOS).save(tmp_path / "a small.jpg", quality=80)
    ImageOps.mirror(picture(128, 96, 1)).save(tmp_path / "b mirrored.png")
    training = write(
        tmp_path,
        "train.jsonl",
        {"references": ["room.png"], "image": "a.png", "name": "first"},
        {"references": ["room.png", "c.png"], "image": "b.png", "name": "second"},
    )
    held_out = write(
        tmp_path,
        "test.jsonl",
        {"references": ["room.png"], "image": "a small.jpg", "name": "copy"},
        {"references": ["room.png"], "image": "b mirrored.png", "name": "mirrored"},
        {"references": ["room.png"], "image": "c.png", "name": "shown"},
        {"references": ["room.png"], "image": "d.png", "name": "new"},
    )
    assert find_duplicates(training, held_out) == [
        "The image of the validation sample copy is also the image of the sample first.",
        "The image of the validation sample shown is also a reference of the sample second.",
    ]
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert len(find_duplicates(training, held_out)) == 1
