"""Schemathesis: whatever the OpenAPI page allows, and what it does not, is answered as the page says."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from server.shared import Service, png
from sparse_context.server.openapi import page
from sparse_context.server.settings import Settings

PICTURES = [png(seed, 16, 16) for seed in range(2)]
schemathesis.openapi.format("binary", st.sampled_from([*PICTURES, b"", b"no picture", PICTURES[0][:60]]))

UNKNOWABLE = [positive_data_acceptance]
"""Whether bytes are a picture, a size suits the model, or there is one budget for each image, no page can say."""

SMALL = {"output_pixels": 64 * 64, "most_steps": 2, "pictures": 2, "prompt": 200, "queue": 3}
schema = schemathesis.openapi.from_dict(page(Settings(name="tiny", **SMALL)))


@pytest.fixture(scope="module")
def small(make_engine):
    """A server that makes small pictures in few steps."""
    service = Service(make_engine(), **SMALL)
    yield service
    service.stop()


@schema.parametrize()
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_the_server_keeps_to_its_page(case, small):
    case.call_and_validate(base_url=small.url, excluded_checks=UNKNOWABLE)
