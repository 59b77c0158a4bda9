"""What the tests of the recipes share."""

from functools import partial

import pytest
import tiny_scenes

from recipes.mini import vae
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec


@pytest.fixture(scope="module")
def assets():
    """Three objects (a disc, a bar, a ring) and two photographs, made here."""
    return tiny_scenes.make_assets()


@pytest.fixture(scope="module")
def pipe():
    """The dense base as it is shipped."""
    return load(ModelSpec(device="cpu", lora="none"))


@pytest.fixture(scope="module")
def few_latents():
    """A VAE's latents are measured on 32 pictures, not on 512, of which drawing and encoding takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "measure_latents", partial(vae.measure_latents, pictures=32))
        yield


@pytest.fixture
def tiny_parts(monkeypatch):
    """A tiny VAE and transformer in the place of the recipe's own."""
    tiny_scenes.use_tiny_parts(monkeypatch)
