"""The server by Ray: what needs no cluster. One with processes that are killed is in tests/test_ray.py."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from sparse_context import SparseContextConfig
from sparse_context.batch.cluster import say_what_is_missing
from sparse_context.pipelines import Cancelled, GenerationError, ModelSpec, Request
from sparse_context.server.on_ray import Replica, Replicas, _plain, write_config
from sparse_context.server.settings import Settings

yaml = pytest.importorskip("yaml")


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"count": 0}, "replicas is 0: pass 1 or more."),
        ({"count": 3, "most": 2}, "max_replicas is 2, and replicas 3: pass as many or more."),
        ({"gpus": -1.0}, "gpus is -1: pass a share of one, such as 0.5, or a whole number."),
        ({"gpus": 1.5}, "gpus is 1.5: pass a share of one, such as 0.5, or a whole number."),
        ({"gpus": float("inf")}, "gpus is inf: pass a share of one, such as 0.5, or a whole number."),
        ({"gpus": float("nan")}, "gpus is nan: pass a share of one, such as 0.5, or a whole number."),
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


def test_a_replica_whose_model_does_not_load_gives_its_calls_back_and_is_then_replaced(tmp_path):
    replica = Replica(ModelSpec(str(tmp_path / "gone"), device="cpu"), threads=1, cache=0)

    async def ask():
        await replica.check_health()  # as long as no call came, so that the front can ask why
        answers = [answer async for answer in replica.make([Request("x")], [0])]
        with pytest.raises(RuntimeError, match="the model does not load here: The model .*gone does not exist"):
            await replica.check_health()
        return answers

    ((kind, reason),) = asyncio.run(ask())
    assert kind == "unfit" and "gone does not exist" in reason and str(replica.failure) == reason


def test_what_ray_would_wait_for_without_a_word_is_said(monkeypatch, capsys):
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0})
    say_what_is_missing(ray, processes=2, threads=2, gpus=0.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="^Ray has too few GPUs .1 of 2.: ask for fewer, or name a cluster"):
        say_what_is_missing(ray, processes=2, threads=2, gpus=1)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    say_what_is_missing(ray, processes=3, threads=2, gpus=0.6)  # of which one GPU holds one
    said = "Ray has too few CPUs (4 of 6) and too few GPUs (1 of 3): what is left over waits until there are more.\n"
    assert capsys.readouterr().err == said


def test_a_config_file_names_files_by_their_whole_paths(tmp_path, monkeypatch):
    """On the cluster, a relative path of two parts would be a hub id that nobody named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "klein").mkdir(parents=True)
    (tmp_path / "overview").mkdir()
    spec = ModelSpec("models/klein", lora="overview", quantization="int8")
    settings = Settings(name="x", config=SparseContextConfig(text_model="models/klein"))
    write_config(tmp_path / "serve.yaml", spec, settings, 9000, Replicas())
    (application,) = yaml.safe_load((tmp_path / "serve.yaml").read_text())["applications"]
    assert application["args"]["keep"]["text_model"] == str(tmp_path / "models" / "klein")
    said = ModelSpec(**application["args"]["model"])
    assert (said.model, said.lora, said.quantization) == (str(tmp_path / "models" / "klein"), "overview", "int8")
    assert ModelSpec("owner/name").with_whole_paths() == ModelSpec("owner/name")
    with pytest.raises(ValueError, match="^port is 70000: pass a number from 0 to 65535.$"):
        write_config(tmp_path / "other.yaml", spec, Settings(name="x"), 70_000, Replicas())
    assert not (tmp_path / "other.yaml").exists()


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
