"""One pipeline for all servers of these tests: a tiny klein, whose answers take a moment."""

import pytest

from server.shared import Service
from sparse_context import ReferenceCache
from sparse_context.pipelines import Engine, ModelSpec


def pytest_collection_modifyitems(items):
    for item in items:  # one worker, so that the pipeline is loaded once
        if "server" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group(name="server"))


@pytest.fixture(scope="session")
def shared_pipe(tiny_model):
    return Engine(ModelSpec(str(tiny_model), dtype="float32", device="cpu"), bar=False).pipe()


@pytest.fixture(scope="session")
def make_engine(tiny_model, shared_pipe):
    """Engines of the one pipeline, each with a cache of its own."""

    def make():
        engine = Engine(
            ModelSpec(str(tiny_model), dtype="float32", device="cpu"), bar=False, cache=ReferenceCache(2**20)
        )
        engine._pipes[engine.spec] = shared_pipe
        return engine

    return make


@pytest.fixture(scope="session")
def service(make_engine):
    """The server of most tests: a queue of 3, two pictures of a call."""
    service = Service(make_engine(), queue=3)
    yield service
    service.stop()


@pytest.fixture
def serve(make_engine):
    """Servers with other settings, which end with the test."""
    services = []

    def start(**settings):
        services.append(Service(make_engine(), **settings))
        return services[-1]

    yield start
    for each in services:
        each.stop()
