"""The training data of the klein recipes: rows as the two data sets have them, to a manifest that training reads."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import picture

from sparse_context.samples import read_samples

SCRIPT = Path(__file__).parents[1] / "runs" / "prepare_klein_data.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("prepare_klein_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(**changes):
    """A row of Subjects200K: two views of 512 x 512 in a frame of 8 pixels, told apart by their colour."""
    image = Image.new("RGB", (1056, 528))
    image.paste((200, 0, 0), (8, 8, 520, 520))
    image.paste((0, 0, 200), (528, 8, 1040, 520))
    return {
        "image": image,
        "quality_assessment": {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5},
        "description": {"item": "red mug", "description_0": "A mug on a table.", "description_1": "A mug in the snow."},
    } | changes


@pytest.mark.parametrize(
    ("number", "prompt", "reference", "target"),
    [
        (0, "A mug on a table. The red mug is the one of image 1.", (0, 0, 200), (200, 0, 0)),
        (1, "A mug in the snow. The red mug is the one of image 1.", (200, 0, 0), (0, 0, 200)),
    ],
)
def test_a_pair_becomes_one_view_made_from_the_other(recipe, number, prompt, reference, target):
    sample, pictures = recipe.subject_sample(pair(), number)
    assert sample == {"prompt": prompt, "task": "subject"}
    for name, colour in (("reference", reference), ("image", target)):
        assert pictures[name].size == (512, 512) and (np.asarray(pictures[name]) == colour).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"quality_assessment": {"compositeStructure": 5, "objectConsistency": 4, "imageQuality": 5}},
        {"quality_assessment": {"compositeStructure": 5, "objectConsistency": None, "imageQuality": 5}},
        {"quality_assessment": None},
        {"description": None},
        {"description": {"item": "", "description_0": "x", "description_1": "y"}},
        {"description": {"item": "mug", "description_0": None, "description_1": "y"}},
        {"image": Image.new("RGB", (1024, 512))},
    ],
)
def test_a_pair_that_is_not_good_enough_is_left_out(recipe, changes):
    assert recipe.subject_sample(pair(**changes), 0) is None


def test_what_is_written_is_a_manifest_and_its_pictures_to_the_last_pixel(recipe, tmp_path):
    edits = [
        {"source_img": picture(40, 24, i), "target_img": picture(40, 24, i + 9), "instruction": f"edit {i}"}
        for i in range(4)
    ]
    rows = [pair(quality_assessment=None), pair(), pair(), pair()]
    made = [
        *recipe.write_samples(rows, recipe.subject_sample, "subject", 2, tmp_path),
        *recipe.write_samples(edits, recipe.edit_sample, "edit", 3, tmp_path),
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in made))
    samples = read_samples(tmp_path / "train.jsonl")
    names = ["subject-000001", "subject-000002", "edit-000000", "edit-000001", "edit-000002"]
    assert [(sample.name, sample.task) for sample in samples] == [(name, name.split("-")[0]) for name in names]
    assert np.array_equal(np.asarray(samples[3].open_references()[0]), np.asarray(edits[1]["source_img"]))
    assert np.array_equal(np.asarray(samples[3].open_image()), np.asarray(edits[1]["target_img"]))
    assert len(list(tmp_path.iterdir())) == 1 + 2 * len(names)  # and no half-written picture


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4B", "9B"])
def test_the_whole_script_trains_a_tiny_model_in_the_place_of_the_large_one(size, tiny_model, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        picture(64, 64, seed).save(tmp_path / f"{name}.png")
    for name in ("train", "validation"):
        row = {"references": ["a.png"], "image": "b.png", "prompt": "the cat"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    output = tmp_path / "out"
    places = {
        "DATA": str(tmp_path),
        "OUTPUT": str(output),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    smaller = [
        "--model",
        tiny_model,
        "--max-train-steps",
        1,
        "--gradient-accumulation-steps",
        1,
        "--rank",
        2,
        "--set",
        "mixed_precision=no",
        "--set",
        "dtype=float32",
    ]
    done = subprocess.run(
        ["bash", SCRIPT.with_name("train_klein.sh"), size, *map(str, smaller)],
        env=os.environ | places,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((output / "config.json").read_text())
    assert config["distillation"] == 1 and config["subsets"] == 3 and config["lora_alpha"] == 64
    assert config["dropping"]["mix"]["subject"] == 0.4 and config["dropping"]["coverage"] == [0.0, 0.1]
    assert (output / "pytorch_lora_weights.safetensors").is_file() and (output / "step-0000001").is_dir()
    assert [file.name for file in (output / "validation").iterdir()] == ["step-0000001.webp"]
