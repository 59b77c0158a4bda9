"""The page, in a browser: what a user does with it, and what it asks of the network and leaves on the disk."""

import base64
import io
import json
import re
import urllib.request

import numpy as np
import pytest
from cli.shared import colourful
from PIL import Image
from tiny_finders import scene

from sparse_context.preview import PHRASE_COLOUR

PAINTED = {"image.png", "background.png", "layer_0.png", "composite.png"}

pytestmark = pytest.mark.xdist_group("app")  # one app and one browser


def png(seed=0):
    file = io.BytesIO()
    colourful(seed).save(file, "PNG")
    return file.getvalue()


def upload(page, **files):
    page.set_input_files(
        "#files input[type=file]",
        [{"name": f"{name}.png", "mimeType": "image/png", "buffer": data} for name, data in files.items()],
    )


def two_references(page):
    upload(page, cat=png(0), room=png(1))
    page.wait_for_selector("#reference-2 .overlay img")


def overlay(page, number):
    """The drawn reference, as an array."""
    source = page.get_attribute(f"#reference-{number} .overlay img", "src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def count(page, number):
    return page.inner_text(f"#reference-{number} .count")


def wait_for_count(page, number, text):
    page.wait_for_function(
        "([card, text]) => document.querySelector(card + ' .count')?.innerText === text",
        arg=[f"#reference-{number}", text],
    )


def choose(page, number, label, option):
    page.locator(f"#reference-{number}").get_by_label(label).click()
    page.get_by_role("option", name=option, exact=True).click()


def press(page, number, key, times):
    page.locator(f"#reference-{number} input[type=range]").focus()
    for _ in range(times):
        page.keyboard.press(key)


def write(page, label, text):
    field = page.get_by_label(label)
    field.fill(text)
    field.blur()


# Overlays -------------------------------------------------------------------------------------------------------------


def test_overlays_follow_what_is_asked_of_each_reference(page):
    two_references(page)
    assert [count(page, number) for number in (1, 2)] == ["13 of 64 tokens"] * 2
    first, second = overlay(page, 1), overlay(page, 2)
    press(page, 1, "ArrowRight", 5)
    wait_for_count(page, 1, "16 of 64 tokens")
    assert not np.array_equal(overlay(page, 1), first) and np.array_equal(overlay(page, 2), second)
    choose(page, 2, "Selector", "uniform")
    page.wait_for_function("document.querySelector('#reference-2 .by').innerText === 'uniform'")
    assert not np.array_equal(overlay(page, 2), second)
    choose(page, 1, "Task", "edit")
    page.wait_for_function("document.querySelector('#reference-1 .by').innerText.includes('edges')")
    assert page.inner_text("#summary .summary") == "29 of 128 tokens kept (23%)"
    page.locator("#reference-1").get_by_role("checkbox").check()
    page.wait_for_function("!document.querySelector('#summary .summary').innerText.startsWith('29 ')")


def test_a_phrase_says_what_is_meant_in_a_reference(page):
    file = io.BytesIO()
    scene(64, 64, "red").save(file, "PNG")
    upload(page, cat=file.getvalue(), room=png(1))
    page.wait_for_selector("#reference-2 .overlay img")
    phrase = page.locator("#reference-1").get_by_label("Phrase")
    phrase.fill("red")
    phrase.blur()
    page.wait_for_function("document.querySelector('#reference-1 .by').innerText === \"phrase 'red'\"")
    unlike = np.abs(overlay(page, 1) - np.float32(PHRASE_COLOUR)).max(-1)  # a JPEG has no exact colours
    assert (unlike < 30).any()
    phrase.fill("green")
    phrase.press("Enter")
    page.wait_for_function("document.querySelector('#summary .summary').innerText.includes('nowhere')")
    said = page.inner_text("#summary .summary")
    assert said.endswith("'green' is nowhere in reference 1, so its tokens are spread evenly")


def test_references_are_removed_and_added(page):
    two_references(page)
    press(page, 2, "ArrowRight", 5)
    wait_for_count(page, 2, "16 of 64 tokens")
    page.locator("#reference-1").get_by_role("button", name="Remove").click()
    wait_for_count(page, 1, "16 of 64 tokens")  # what was asked of it comes along
    assert not page.locator("#reference-2").is_visible()
    assert page.inner_text("#reference-1 .name") == "room.png"
    upload(page, third=png(2))
    page.wait_for_selector("#reference-2 .overlay img")
    assert count(page, 2) == "13 of 64 tokens"


def test_one_budget_for_all_and_what_does_not_fit(page):
    two_references(page)
    page.get_by_text("More settings").click()
    page.get_by_label("shared").check()
    write(page, "Shared keep", "40")
    wait_for_count(page, 1, "20 of 64 tokens")
    assert not page.locator("#reference-1 .keep").is_visible()
    write(page, "Coverage", "3")
    page.wait_for_selector("#summary .problem")
    assert page.inner_text("#summary .problem") == "coverage is 3: pass a share from 0 to 1."
    assert page.locator(".card .overlay img").count() == 2 and page.locator(".card .count").count() == 0
    write(page, "Coverage", "")
    wait_for_count(page, 1, "20 of 64 tokens")


def test_what_is_painted_is_kept(page):
    upload(page, cat=png(0))
    page.wait_for_selector("#reference-1 .overlay img")
    before = overlay(page, 1)
    page.get_by_role("button", name="Paint mask").click()
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(1000)  # until the canvas has taken its size
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y - 40)
    page.mouse.down()
    page.mouse.move(x + 40, y + 40, steps=8)
    page.mouse.up()
    page.wait_for_function("document.querySelector('#reference-1 .by').innerText.includes('mask')")
    assert not np.array_equal(overlay(page, 1), before)
    middle = overlay(page, 1)[200:248, 200:248].astype(int)
    assert np.ptp(middle, axis=-1).max() > 60  # in its own colours
    page.get_by_role("tab", name="Copy").click()
    with page.expect_download() as download:
        page.get_by_text("Download mask of image 1").click()
    with Image.open(download.value.path()) as mask:
        assert mask.size == (64, 64) and mask.getpixel((32, 32)) == 255 and mask.getpixel((0, 63)) == 128
    page.get_by_role("button", name="Clear mask").click()
    page.wait_for_function("!document.querySelector('#reference-1 .by').innerText.includes('mask')")
    assert np.array_equal(overlay(page, 1), before)


def test_examples_are_there_without_a_network(page):
    page.get_by_text("Examples").click()
    page.locator("#examples button").nth(8).click()
    page.wait_for_selector("#reference-2 .overlay img")
    assert page.input_value("#prompt textarea") == "The object of image 1 in front of image 2."
    assert page.inner_text("#reference-1 .name") == "in-front-1.webp"
    assert page.locator("#reference-2").get_by_label("Task").input_value() == "edit"


# Pictures -------------------------------------------------------------------------------------------------------------


def test_dense_beside_sparse_on_a_slider_for_keys(page):
    two_references(page)
    page.fill("#prompt textarea", "the cat")
    page.click("#generate")
    page.wait_for_selector("#result .compare")
    assert page.locator("#figures tbody tr").count() == 2
    assert "as fast" in page.inner_text("#figures")
    slider = page.locator("#result input[type=range]")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    clip = page.locator("#result .upper").evaluate("image => getComputedStyle(image).clipPath")
    assert slider.input_value() == "30" and clip == "inset(0px 0px 0px 30%)"
    page.mouse.click(*middle_of(page, "#result .compare", 0.75))
    assert 70 <= int(slider.input_value()) <= 80
    with page.expect_download() as download:
        page.get_by_text("Download image").click()
    with Image.open(download.value.path()) as picture:
        assert picture.size == (64, 64) and not picture.info
    assert download.value.suggested_filename == "sparse-context.png"


def middle_of(page, selector, share):
    box = page.locator(selector).bounding_box()
    return box["x"] + box["width"] * share, box["y"] + box["height"] / 2


def test_the_scene_is_copied(page, tiny_model, clipseg):
    two_references(page)
    page.fill("#prompt textarea", "the cat's hat")
    write(page, "Steps", "1")
    page.get_by_role("tab", name="Copy").click()
    page.wait_for_function("document.querySelector('#command').innerText.includes('--steps')")
    assert "open_picture('cat.png')" in page.inner_text("#python")
    with page.expect_download() as download:
        page.get_by_text("Download settings").click()
    settings = json.loads(download.value.path().read_text())
    assert settings == {
        "model": str(tiny_model), "dtype": "float32", "keep": 0.2, "prompt": "the cat's hat", "steps": 1,
        "text_model": str(clipseg),
    }  # fmt: skip


def test_a_sweep_is_stopped(page):
    two_references(page)
    write(page, "Steps", "100")
    page.get_by_role("tab", name="Sweep").click()
    page.click("#sweep")
    page.wait_for_selector("#sweep-result td img")
    page.click("#stop-sweep")
    page.wait_for_function("document.querySelector('#sweep-status').innerText.includes('Stopped.')")
    made = int(re.search(r"Stopped. (\d) of 7", page.inner_text("#sweep-status"))[1])
    assert page.locator("#sweep-result td img").count() == made - 1 < 6


def test_a_page_that_is_closed_stops_its_work(page, address):
    """The other page's picture comes though the first one's would take until the test has failed."""
    other = page.context.new_page()
    other.goto(address)
    other.get_by_label("Steps", exact=True).fill("1000")
    other.get_by_text("More settings").click()
    write(other, "Height", "512")
    write(other, "Width", "512")
    other.click("#generate")
    other.wait_for_function("/step [0-9]+ of/.test(document.querySelector('#status').innerText)")
    other.close()
    page.click("#generate")
    page.wait_for_selector("#result img")


# What goes wrong ------------------------------------------------------------------------------------------------------


def toast(page):
    page.wait_for_selector(".toast-body")
    return " ".join(page.inner_text(".toast-body").split())


def test_a_broken_file_is_said_in_the_library_s_words(page):
    upload(page, broken=png()[:100], cat=png())
    assert "'broken.png' is damaged or cut short" in toast(page)
    page.wait_for_selector("#reference-1 .overlay img")  # the other one is there
    assert not page.locator("#reference-2").is_visible()


def test_what_a_model_does_not_take_is_said_in_the_library_s_words(page):
    upload(page, a=png(0), b=png(1), c=png(2), d=png(3))
    page.wait_for_selector("#summary .problem")
    page.click("#generate")
    assert "There are 4 references, and this model takes at most 3: pass fewer." in toast(page)
    assert not page.locator("#status .progress").count()
    assert page.locator(".card .overlay img").count() == 4 and page.locator(".card .count").count() == 0
    page.locator("#reference-4").get_by_role("button", name="Remove").click()
    wait_for_count(page, 3, "13 of 64 tokens")


def test_more_pictures_than_the_page_has_room_for(page):
    upload(page, **{f"p{i}": png(i) for i in range(12)})
    assert "There are more than 10 references: the last 2 are left out." in toast(page)
    page.wait_for_selector("#reference-10 .overlay img")  # alone, for the model takes three
    assert page.locator(".card:visible").count() == 10


def test_a_name_is_text_and_no_part_of_the_page(page):
    upload(page, **{"<img src=x onerror=document.title='owned'>": png()})
    page.wait_for_selector("#reference-1 .overlay img")
    assert page.title() == "Sparse Context"


# Everybody ------------------------------------------------------------------------------------------------------------


def test_all_is_reached_by_keys_alone(page):
    two_references(page)
    page.locator("body").click(position={"x": 2, "y": 2})
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(() => { const e = document.activeElement;"
                "const near = e.closest('#files, .card, #prompt, #generate, #stop');"
                "return near?.id + ' ' + (e.getAttribute('aria-label') || e.innerText || e.type || '').trim(); })()"
            )
        )
    for wanted in ("files ", "reference-1 Paint", "reference-2 Remove", "prompt ", "generate ", "stop "):
        assert any(each.startswith(wanted) for each in reached), (wanted, reached)


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_phone_needs_no_scrolling_sideways(browser, address, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#files")
    two_references(page)
    page.click("#generate")
    page.wait_for_selector("#result .compare")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128")
    assert light == (scheme == "light")
    context.close()


def test_nothing_is_sent_elsewhere_and_nothing_is_left(page, app_folder):
    """All that the app has looked up or spoken to since it began, and the files that it has."""
    two_references(page)
    addresses = (app_folder / "addresses.txt").read_text().splitlines()
    assert addresses != []
    strangers = [line for line in addresses if not any(known in line for known in ("127.0.0.1", "localhost", "::1"))]
    assert strangers == []
    files = [path for path in app_folder.rglob("*") if path.is_file()]
    names = {path.name for path in files} - {"addresses.txt", "log.txt"}
    assert names <= {"image.webp", *PAINTED}  # examples; and what the painter has, for a minute
    assert "Traceback" not in (app_folder / "log.txt").read_text()


def test_a_page_that_the_app_has_forgotten_says_so_and_makes_nothing(page):
    """Its connection was lost, or the app begun anew, while the page still shows what it held."""
    beats = []
    page.on("request", lambda request: beats.append(request.url) if "/heartbeat/" in request.url else None)
    page.reload()
    two_references(page)
    with urllib.request.urlopen(beats[-1]) as connection:  # of this page, once more: at its end the page counts as gone
        connection.read(1)
    page.wait_for_timeout(1000)
    press(page, 1, "ArrowRight", 1)
    said = "The app no longer holds the images of this page: reload the page."
    page.wait_for_function("said => document.querySelector('#summary').innerText.includes(said)", arg=said)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("said => document.body.innerText.split(said).length > 2", arg=said)
    page.reload()
    two_references(page)
    assert count(page, 1) == "13 of 64 tokens"
