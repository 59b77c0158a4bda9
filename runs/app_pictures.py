"""The web app as it looks, at a desk and on a phone, in light and in dark: pictures for its page of the docs.

The app runs with the embedded model, and Chromium in front of it. Every state of the page can be written as PNG, to be
looked at; the docs show few of them.

    python runs/app_pictures.py [--all FOLDER]
"""

import argparse
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app_browser import App, find_browser, running_app, running_browser
from pictures import save
from PIL import Image

from sparse_context.preview import side_by_side

SIZES = {"desk": {"width": 1280, "height": 1000}, "phone": {"width": 390, "height": 844}}
PAGES = (("phone", "dark", True), ("desk", "light", True), ("phone", "light", False), ("desk", "dark", False))
"""Of which size and colours, and whether images are generated on it."""
EXAMPLE = ("in-front", 2)  # and how many references it has
PHONE = ("phone-light-references", "phone-light-painter", "phone-dark-result", "phone-dark-sweep")
"""Beside each other in one picture for the docs."""


def shots(app: App, generates: bool) -> Iterator[tuple[str, Image.Image]]:
    """The states of the page that a user sees, by name."""
    page = app.page
    wide = page.viewport_size["width"] > 1000

    def shot(name: str, anchor: str) -> tuple[str, Image.Image]:
        page.mouse.move(0, 0)
        page.evaluate("anchor => document.querySelector(anchor).scrollIntoView()", anchor)
        page.wait_for_timeout(800)  # until what slides has come to rest
        return name, Image.open(io.BytesIO(page.screenshot())).convert("RGB")

    yield shot("empty", "body")
    app.take(*EXAMPLE)
    yield shot("examples", "body")
    page.get_by_role("button", name="Examples").click()
    yield shot("references", "#summary")
    page.get_by_text("More settings").click()
    yield shot("settings", "#prompt")
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Paint mask").first.click()
    page.wait_for_selector("#editor canvas")
    paint(page)
    yield shot("painter", "#painter")
    page.get_by_role("button", name="Clear mask").click()
    page.get_by_role("button", name="Done").click()
    if generates:
        app.generate()
        yield shot("result", "body" if wide else "#generate")
    page.get_by_role("tab", name="Sweep").click()
    if generates:
        page.get_by_label("Keeps").fill("0.2, 0.5")
        page.click("#sweep")
        page.wait_for_function("document.querySelector('#sweep-status').innerText === '5 images.'")
    yield shot("sweep", "body" if wide else "#sweep")
    page.get_by_role("tab", name="Copy").click()
    yield shot("copy", "body" if wide else "#python")


def paint(page: Any) -> None:
    """A stroke across the painter, and the overlay that follows."""
    painted = "document.querySelector('#reference-1 .by').innerText.includes('mask')"
    while not page.evaluate(painted):  # a stroke before the canvas has its size is none
        canvas = page.locator("#editor canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 40, y - 40)
        page.mouse.down()
        page.mouse.move(x + 40, y + 40, steps=8)
        page.mouse.up()
        page.wait_for_timeout(3000)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the web app for the docs, in a browser.")
    parser.add_argument("--all", type=Path, help="also write every picture into this folder, as PNG")
    arguments = parser.parse_args()
    program = find_browser()
    if program is None:
        parser.error("no Chromium or Chrome is installed: apt-get install chromium")
    found: dict[str, Image.Image] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_app(Path(folder), "--device", "cpu") as address,
        running_browser(program) as browser,
    ):
        for size, scheme, generates in PAGES:
            page = browser.new_page(viewport=SIZES[size], color_scheme=scheme)
            for name, picture in shots(App(page, address), generates):
                found[f"{size}-{scheme}-{name}"] = picture
                if arguments.all is not None:
                    arguments.all.mkdir(parents=True, exist_ok=True)
                    picture.save(arguments.all / f"{size}-{scheme}-{name}.png")
            page.close()
    save(found["desk-light-result"], "app")
    save(side_by_side([found[name] for name in PHONE]), "app-phone")


if __name__ == "__main__":
    main()
