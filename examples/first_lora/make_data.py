"""Data for the tutorial "Your first sparse LoRA": edits of example images, as the model makes them with all tokens.

    python examples/first_lora/make_data.py [FOLDER] [--samples 48]

Writes train.jsonl with so many samples, test.jsonl with a quarter as many of other images, and all their images.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from sparse_context import SparseContextConfig
from sparse_context.embedded.demo import read_examples
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.spec import ModelSpec, Request

SCENES = {"train": ("background", "background-2", "negative", "grey"), "test": ("sepia", "recoloured")}
TURNS = (lambda image: image, ImageOps.mirror, ImageOps.flip, lambda image: image.rotate(180))
PROMPTS = ("Make the background plain {}.", "Make the object {}.", "Turn the picture grey.")
COLOURS = ("red", "yellow", "blue", "green", "purple", "white", "black", "orange")


def draw_samples(part: str) -> Iterator[tuple[str, Image.Image]]:
    """Prompts, and the image that each of them edits."""
    images = {scene["name"]: scene["references"][0] for scene in read_examples()}
    every = product(TURNS, PROMPTS, SCENES[part])
    for number, (turn, prompt, name) in enumerate(every):
        yield prompt.format(COLOURS[number % len(COLOURS)]), turn(images[name])


def main() -> None:
    parser = argparse.ArgumentParser(description="Data for a first LoRA.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--samples", type=int, default=48)
    arguments = parser.parse_args()
    engine = Engine(ModelSpec(lora="none"), bar=False)
    for part, count in (("train", arguments.samples), ("test", max(1, arguments.samples // 4))):
        (arguments.folder / part).mkdir(parents=True, exist_ok=True)
        rows = []
        for number, (prompt, reference) in enumerate(tqdm([*islice(draw_samples(part), count)], part, unit="image")):
            truth = engine(Request(prompt, [reference], SparseContextConfig(keep=1.0), seed=number)).image
            row = {"prompt": prompt}
            for field, image in (("references", reference), ("image", truth)):
                file = f"{part}/{number:02}-{field}.png"
                image.save(arguments.folder / file)
                row[field] = [file] if field == "references" else file
            rows.append(json.dumps(row) + "\n")
        (arguments.folder / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
    print(f"wrote train.jsonl and test.jsonl into {arguments.folder.resolve()}")


if __name__ == "__main__":
    main()
