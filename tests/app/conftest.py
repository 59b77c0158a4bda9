"""What the tests of the app share: a tiny model, pictures, and the app behind a browser."""

import asyncio
import os
import warnings

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import pytest
from app_browser import find_browser, running_app, running_browser
from cli.shared import colourful

from sparse_context.app.scene import Reference
from sparse_context.pipelines import Engine, ModelSpec


@pytest.fixture(scope="session")
def spec(tiny_model):
    return ModelSpec(str(tiny_model), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def engine(spec):
    return Engine(spec, bar=False)


@pytest.fixture
def cat():
    return Reference("cat.png", colourful(0))


@pytest.fixture
def room():
    return Reference("room 2.png", colourful(1))


def in_a_loop(make, *args):
    """`make(*args)` while an event loop runs: without one, Gradio makes some for its pages and never closes them."""

    async def made():
        return make(*args)

    return asyncio.run(made())


@pytest.fixture(scope="module")
def browser():
    """Chromium or Chrome; `make test` and CI install it where they can.

    For one module, because Playwright leaves no room for another event loop in its thread.
    """
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome is installed: apt-get install chromium")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Playwright's own
        with running_browser(program) as browser:
            yield browser


@pytest.fixture(scope="module")
def app_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def address(tiny_model, clipseg, app_folder, browser):
    """Where the app answers, with a tiny model and with the embedded one, and a model that finds colours."""
    with running_app(app_folder, "--model", tiny_model, "--dtype", "float32", "--text-model", clipseg) as address:
        yield address


@pytest.fixture
def page(browser, address):
    """The app's page, at a desk. No request may leave loopback, and nothing may fail in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    context.set_default_timeout(120_000)  # a busy machine is no error
    page = context.new_page()
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#files")
    yield page
    context.close()
    assert hosts == {address.split("/")[2]}
    assert errors == []
