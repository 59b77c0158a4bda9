"""Batches of several: their pictures have sizes in common that do not depend on what they meet."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import picture

from sparse_context.preview import MAX_ASPECT
from sparse_context.samples import ManifestError, read_samples
from sparse_context.training.buckets import MULTIPLE, bucket
from sparse_context.training.data import Batches


@pytest.mark.parametrize(
    ("size", "made"),
    [
        ((512, 512), (512, 512)),
        ((1024, 1024), (512, 512)),
        ((1600, 1200), (576, 432)),  # 4 : 3
        ((1200, 1600), (432, 576)),
        ((1620, 1080), (624, 416)),  # 3 : 2
        ((1920, 1080), (672, 384)),  # 16 : 9
        ((300, 300), (256, 256)),  # a half would be 362 pixels a side
        ((505, 505), (512, 512)),  # up by a fiftieth at most
        ((5000, 100), (1408, 176)),
        ((20, 20), (64, 64)),
    ],
)
def test_a_bucket_has_the_shape_of_its_pictures(size, made):
    assert bucket(size, 512) == made


def test_buckets_waste_little():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(64, 3000, (300, 2)).tolist():
        ratio = max(width, height) / min(width, height)
        wide, high = bucket((width, height), 512)
        assert wide % MULTIPLE == high % MULTIPLE == 0 and min(wide, high) >= 64
        assert max(wide, high) <= MAX_ASPECT * min(wide, high)
        scale = max(wide / width, high / height)
        if min(width, height) > 128 and ratio < 8:  # or no side may be as small as that
            assert scale < 1.15 and wide * high <= 512**2
            if ratio < 7:
                assert wide * high > 0.75 * (width * scale) * (height * scale)


@pytest.fixture
def samples(tmp_path):
    """Seven samples: targets of two shapes and three sizes, references of two shapes."""
    rows = []
    for i, size in enumerate([(128, 96), (256, 192), (96, 128), (130, 96), (128, 96), (96, 128), (260, 196)]):
        picture(*size, i).save(tmp_path / f"{i}.png")
        picture(96, 96 + 32 * (i == 4), i).save(tmp_path / f"r{i}.png")
        rows.append(json.dumps({"references": [f"r{i}.png"], "image": f"{i}.png", "prompt": f"p{i}"}))
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    return read_samples(tmp_path / "m.jsonl")


def test_a_batch_has_one_shape_and_a_sample_the_same_in_every_batch(samples):
    batches = Batches(samples, 2, 0, 256, 96)
    seen = {}
    for number in range(4 * len(batches)):
        batch = batches(number)
        assert len({example.image.size for example in batch}) == 1
        assert len({example.references[0].size for example in batch}) == 1
        for example in batch:
            content = example.image.tobytes(), example.references[0].tobytes()
            assert seen.setdefault(example.prompt, content) == content
    assert sorted(seen) == [f"p{i}" for i in range(7)]
    groups = {frozenset(batches.indices(number).tolist()) for number in range(len(batches))}
    assert frozenset({2, 5}) in groups and frozenset({4}) in groups  # upright ones, and one with another reference


def test_what_has_the_shape_of_its_bucket_is_not_cropped(tmp_path):
    picture(640, 480, 1).save(tmp_path / "a.png")
    row = json.dumps({"references": ["a.png"], "image": "a.png", "prompt": ""})
    (tmp_path / "m.jsonl").write_text(f"{row}\n{row}")
    (first, second) = Batches(read_samples(tmp_path / "m.jsonl"), 2, 0, 256, 256)(0)
    assert first.image.size == bucket((640, 480), 256) == (288, 208)
    whole = Image.open(tmp_path / "a.png").resize((288, 216), Image.Resampling.LANCZOS)
    difference = np.asarray(whole.crop((0, 4, 288, 212)), int) - np.asarray(first.image, int)
    assert np.abs(difference).max() <= 8  # but for the rounding to whole tokens
    assert first.image.tobytes() == second.image.tobytes()


def test_sizes_are_those_of_upright_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(128, 96).save(tmp_path / "turned.jpg", exif=exif)
    row = json.dumps({"references": ["turned.jpg"], "image": "turned.jpg", "prompt": ""})
    (tmp_path / "m.jsonl").write_text(f"{row}\n{row}")
    (example, _) = Batches(read_samples(tmp_path / "m.jsonl"), 2, 0, 512, 512)(0)
    assert example.image.size == bucket((96, 128), 512)
    (tmp_path / "turned.jpg").write_text("no picture")
    with pytest.raises(ManifestError, match="The sample 000001 cannot be used: .*turned.jpg' is not a picture"):
        Batches(read_samples(tmp_path / "m.jsonl"), 2, 0, 512, 512)
