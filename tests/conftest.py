"""What several test modules share: a tiny model on disk, and no way to the model hub."""

import json
import os

# Nothing is fetched in a test. Read when huggingface_hub is imported, and by the commands that tests start.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
# Tiny tensors gain nothing from threads, and on a busy machine threads that wait for each other cost a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# The one profile: a busy machine is no error. In CI the same examples come every time.
settings.register_profile("tests", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tests")


@pytest.fixture
def impatient(monkeypatch):
    """The hub's client tries again at once, where its waits come to 23 seconds."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny klein in the diffusers layout, whose references are scaled to 64 x 64 pixels."""
    import tiny
    from call import CALL
    from diffusers import Flux2KleinPipeline

    folder = tmp_path_factory.mktemp("model") / "tiny klein"
    tiny.build_flux2(Flux2KleinPipeline, is_distilled=True).save_pretrained(folder)
    (folder / "call.json").write_text(json.dumps(CALL))
    return folder


@pytest.fixture(scope="session")
def clipseg(tmp_path_factory):
    """The folder of a tiny CLIPSeg that finds red, blue and green."""
    from tiny_finders import save_clipseg

    folder = tmp_path_factory.mktemp("finder") / "clipseg"
    save_clipseg(folder)
    return folder
