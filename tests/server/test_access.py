"""Who may ask, what anybody may see, and the shape of what is refused."""

import json

import openai
import pytest
from starlette.routing import Route

from server.shared import Service, multipart, png, wait_for
from sparse_context import SparseContextConfig
from sparse_context.server.settings import Settings

KEY = "a key of this test, and of no other"


@pytest.fixture(scope="module")
def locked(make_engine):
    service = Service(make_engine(), api_key=KEY, host="0.0.0.0")
    yield service
    service.stop()


def error(answer):
    return json.loads(answer)["error"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nothing"])
@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xff"])
def test_without_the_key_nothing_is_said(locked, path, given):
    status, headers, answer = locked.get(path, {} if given is None else {"Authorization": given})
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert error(answer) == {
        "message": "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }


def test_a_key_opens_and_health_needs_none(locked):
    assert locked.get("/health")[0] == locked.get("/ready")[0] == 200
    assert locked.get("/metrics", {"Authorization": f"Bearer {KEY}"})[0] == 200
    assert locked.client(api_key=KEY).images.edit(image=png(), prompt="the cat").data
    with pytest.raises(openai.AuthenticationError):
        locked.client(api_key="wrong").images.edit(image=png(), prompt="the cat")


def test_a_wrong_key_is_refused_before_the_body_is_read(locked):
    kind, body = multipart([("prompt", "the cat"), ("image", png())])
    uploads = locked.figure("requests_total", path="/v1/images/edits", status="401")
    status, headers, _ = locked.get("/v1/images/edits", {"Content-Type": kind}, "POST", body)
    assert (status, headers["connection"]) == (401, "close")
    # It is counted once the connection is closed
    wait_for(lambda: locked.figure("requests_total", path="/v1/images/edits", status="401") == uploads + 1)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.1", "Origin": "http://127.0.0.1:3000"}, 200),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "127.0.0.1", "Origin": "https://evil.example"}, 403),
        ({"Host": "127.0.0.1", "Origin": "null"}, 403),
    ],
    ids=str,
)
def test_without_a_key_only_this_machine_is_answered_and_no_page_of_another_site(service, headers, status):
    got, _, answer = service.get("/v1/models", headers)
    assert got == status
    if status == 403:
        assert error(answer)["code"] == "host_not_allowed" and error(answer)["type"] == "permission_error"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"host": "0.0.0.0"},
            "host is '0.0.0.0', which others can reach, and there is no API key: set SPARSE_CONTEXT_",
        ),
        ({"api_key": "short"}, "The API key has 5 characters: choose one of 16 or more."),
        ({"api_key": "ключ" * 5}, "The API key has other characters than ASCII"),
        ({"queue": 0}, "queue is 0: pass 1 or more."),
        ({"deadline": 0}, "deadline is 0: pass a number of seconds above 0."),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"batch": 0}, "batch is 0: pass 1 or more, or auto."),
        ({"config": SparseContextConfig(keep=[0.1, 0.2])}, "keep is [0.1, 0.2]: pass one value, for clients send any"),
        ({"keep_high": 7.5}, "keep is 7.5: pass a ratio above 0"),
    ],
    ids=str,
)
def test_settings_refuse_what_would_be_open_or_empty(fields, says):
    with pytest.raises(ValueError) as caught:
        Settings(name="tiny", **fields)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/redoc", 404, "not_found"),
        ("GET", "/v1/images/edits/", 404, "not_found"),
        ("GET", "/v1/models/../../etc/passwd", 404, "model_not_found"),
        ("GET", "/v1/images/edits", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there_is_refused_in_the_same_shape(service, method, path, status, code):
    got, headers, answer = service.get(path, method=method)
    assert (got, error(answer)["code"], error(answer)["type"]) == (status, code, "invalid_request_error")
    assert ("allow" in headers) == (status == 405)
    assert headers["x-content-type-options"] == "nosniff" and len(headers["x-request-id"]) == 32


def test_a_defect_is_one_sentence_and_its_cause_stays_in_the_log(service, monkeypatch, caplog):
    monkeypatch.setattr(service.server, "_opening", None)
    kind, body = multipart([("prompt", "the cat"), ("image", png())])
    status, headers, answer = service.get("/v1/images/edits", {"Content-Type": kind}, "POST", body)
    assert (status, headers["x-should-retry"]) == (500, "false")
    assert error(answer)["message"] == "The server failed at this request: its log says why."
    wait_for(lambda: headers["x-request-id"] in caplog.text)  # it is logged once the answer is out
    assert "AttributeError" in caplog.text


def test_the_figures_are_those_of_the_issue(service):
    service.client().images.edit(image=png(30), prompt="the cat", extra_body={"keep": 0.25, "selector": "edges"})
    status, headers, text = service.get("/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    for name in (
        "queue_jobs 0.0",
        'phase_seconds_count{phase="denoise"}',
        'phase_seconds_count{phase="selection"}',
        'reference_tokens_total{fate="kept"}',
        'reference_tokens_total{fate="dropped"}',
        'cache_lookups_total{result="hit"}',
        "batch_pictures_count",
        'requests_total{path="/v1/images/edits",status="200"}',
    ):
        assert f"\nsparse_context_{name}" in text.decode()
    kept, dropped = (service.figure("reference_tokens_total", fate=fate) for fate in ("kept", "dropped"))
    service.client().images.edit(image=png(30), prompt="the cat", extra_body={"keep": 0.25, "selector": "edges"})
    assert service.figure("reference_tokens_total", fate="kept") == kept + 16
    assert service.figure("reference_tokens_total", fate="dropped") == dropped + 48


def test_the_openapi_page_has_every_route(service):
    status, _, text = service.get("/openapi.json")
    page = json.loads(text)
    assert status == 200
    app = service.uvicorn.config.app
    routes = {(r.path.replace(":path", ""), *r.methods) for r in app.app.routes if isinstance(r, Route)}
    named = {(path, *map(str.upper, operations)) for path, operations in page["paths"].items()}
    assert named == {route for route in routes if not route[0].startswith("/openapi")}
    form = page["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "prompt", "keep", "selector", "task", "coverage", "overview", "n", "size"} <= set(
        form["properties"]
    )
