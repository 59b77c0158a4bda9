"""The server by Ray: what needs no cluster. One with processes that are killed is in tests/test_ray.py."""

import json

import pytest

from sparse_context import SparseContextConfig
from sparse_context.pipelines import Cancelled, GenerationError, ModelSpec
from sparse_context.server.on_ray import Replicas, _plain, write_config
from sparse_context.server.settings import Settings

yaml = pytest.importorskip("yaml")


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"count": 0}, "replicas is 0: pass 1 or more."),
        ({"count": 3, "most": 2}, "max_replicas is 2, and replicas 3: pass as many or more."),
        ({"gpus": -1.0}, "gpus is -1.0: pass 0 or more."),
        ({"gpus": float("nan")}, "gpus is nan: pass 0 or more."),
    ],
)
def test_numbers_of_replicas_that_cannot_be(numbers, says):
    with pytest.raises(ValueError) as raised:
        Replicas(**numbers)
    assert str(raised.value) == says


def test_the_largest_number_of_replicas():
    assert Replicas(2).largest == 2 and Replicas(2, 5).largest == 5


@pytest.mark.parametrize("kind", [ValueError, GenerationError, Cancelled])
def test_an_error_keeps_its_kind_and_its_words_on_its_way(kind):
    class Deeper(kind):
        def __init__(self, said, more):
            super().__init__(said)

    plain = _plain(Deeper("what is wrong", object()))
    assert type(plain) is kind and str(plain) == "what is wrong"
    assert type(_plain(KeyError("x"))) is RuntimeError


def test_a_config_file_says_where_to_listen_and_holds_no_key(tmp_path):
    config = SparseContextConfig(keep=0.3, selector={"edges": 1, "uniform": 1}, overview=None)
    settings = Settings(name="tiny", config=config, api_key="0123456789abcdef", queue=5)
    spec, replicas = ModelSpec("a folder", dtype="float32"), Replicas(2, 4, gpus=0.5)
    write_config(tmp_path / "serve.yaml", spec, settings, 9000, replicas)
    text = (tmp_path / "serve.yaml").read_text()
    assert "0123456789abcdef" not in text
    found = yaml.safe_load(text)
    assert found["http_options"] == {"host": "127.0.0.1", "port": 9000}
    (application,) = found["applications"]
    assert application["import_path"] == "sparse_context.server.on_ray:app"
    args = application["args"]
    assert ModelSpec(**args["model"]) == spec and Replicas(**args["replicas"]) == replicas
    assert args["keep"] == {"keep": 0.3, "selector": {"edges": 1, "uniform": 1}, "overview": None}
    assert Settings(**args["server"], config=config, api_key="0123456789abcdef") == settings
    assert json.loads(json.dumps(args)) == args
