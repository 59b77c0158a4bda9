"""The queue and the one worker: what waits, what is refused, who leaves, who comes back, what is made together."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import openai
import pytest
import torch

from server.shared import PATIENCE, held, multipart, opened, pixels, png, wait_for
from sparse_context.pipelines import Engine, ModelSpec
from sparse_context.server.errors import ApiError
from sparse_context.server.metrics import Metrics
from sparse_context.server.settings import Settings
from sparse_context.server.worker import Worker

FIELDS = {"prompt": "the cat"}


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def ask(service, seed=0, image=None, client=None, **fields):
    extra = {"seed": seed, **fields.pop("extra", {})}
    client = client or service.client()
    return client.images.edit(image=image or png(), prompt=fields.pop("prompt", "the cat"), extra_body=extra, **fields)


def raw(service, fields, headers=None):
    """A connection on which a whole request was sent, and no answer read."""
    kind, body = multipart(fields)
    lines = {"Host": "127.0.0.1", "Content-Type": kind, "Content-Length": len(body), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE)
    connection.sendall(f"POST /v1/images/edits HTTP/1.1\r\n{head}\r\n".encode() + body)
    return connection


AGAIN = {"x-stainless-retry-count": "1"}


def send(service, **headers):
    """A request without a seed."""
    return service.client().images.edit(image=png(5), prompt="the cat", extra_headers=headers)


def seeds(answer):
    return [made["seed"] for made in answer.model_extra["sparse_context"]["pictures"]]


def together(answer):
    return answer.model_extra["sparse_context"]["pictures"][0]["together"]


def fill(service, hold, pool):
    """One request that runs, and behind it as many as may wait."""
    running = pool.submit(ask, service, 0)
    assert hold.entered.wait(PATIENCE)  # or the last one might find the first still waiting
    waiting = [pool.submit(ask, service, seed, png(seed)) for seed in (1, 2, 3)]
    wait_for(lambda: service.figure("queue_jobs") == 3)
    return [running, *waiting]


def test_pictures_that_do_not_fit_together_are_made_one_by_one(service, shared_pipe):
    def fill(module, args, kwargs):
        if len(kwargs["hidden_states"]) > 1:
            raise torch.OutOfMemoryError("two are too many")

    handle = shared_pipe.transformer.register_forward_pre_hook(fill, with_kwargs=True)
    try:
        answer = ask(service, 3, n=2)
    finally:
        handle.remove()
    assert seeds(answer) == [3, 4] and together(answer) == 1
    assert [each.b64_json for each in answer.data] == [ask(service, seed).data[0].b64_json for seed in (3, 4)]


def test_a_model_that_does_not_load_is_logged_and_told(caplog, tmp_path):
    """Where nobody ends the server for it, as in a file that is deployed to Ray."""
    worker = Worker(Engine(ModelSpec(str(tmp_path / "gone"), device="cpu")), Settings(name="x"), Metrics())
    with caplog.at_level("ERROR", logger="sparse_context.server"):
        worker.start()
        wait_for(lambda: caplog.records)
    assert caplog.messages[0].startswith(f"the model does not load: The model {tmp_path / 'gone'} does not exist")
    with pytest.raises(ApiError) as raised:
        worker.check_room()
    assert (raised.value.status, raised.value.code) == (503, "not_loaded")


# What waits and what is refused ---------------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_a_time_and_serves_what_waits(service, shared_pipe, pool):
    refused = service.figure("refused_total")
    with held(shared_pipe) as hold:
        busy = fill(service, hold, pool)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(service, 4)
        assert service.figure("running_jobs") == 1
        hold.let_go()
        answers = [each.result(PATIENCE) for each in busy]
    assert caught.value.body["code"] == "queue_full" and caught.value.type == "rate_limit_error"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert str(caught.value.body["message"]).startswith("The queue is full: try again in ")
    assert [seeds(answer) for answer in answers] == [[0], [1], [2], [3]]
    assert service.figure("refused_total") == refused + 1
    wait_for(lambda: service.figure("running_jobs") == 0)
    assert service.figure("queue_jobs") == 0


def test_the_client_comes_again_by_itself_and_is_served(service, shared_pipe, pool):
    with held(shared_pipe) as hold:
        busy = fill(service, hold, pool)
        refused = service.figure("refused_total")
        patient = pool.submit(ask, service, 9, client=service.client(max_retries=5))
        wait_for(lambda: service.figure("refused_total") > refused)
        hold.let_go()
        assert seeds(patient.result(PATIENCE)) == [9]
        for each in busy:
            each.result(PATIENCE)


def test_a_full_queue_refuses_before_the_body_is_read(service, shared_pipe, pool):
    with held(shared_pipe) as hold:
        busy = fill(service, hold, pool)
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as connection:
            head = "Host: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n"
            connection.sendall(f"POST /v1/images/edits HTTP/1.1\r\n{head}".encode())
            assert connection.recv(13, socket.MSG_WAITALL) == b"HTTP/1.1 429 "
        hold.let_go()
        for each in busy:
            each.result(PATIENCE)


def test_a_request_that_takes_too_long_is_given_up(serve, shared_pipe):
    service = serve(deadline=4.0)
    with held(shared_pipe) as hold:
        with pytest.raises(openai.InternalServerError, match="was not answered within 4 s: ask for fewer") as caught:
            ask(service, client=service.client(max_retries=2))  # who is told not to come again
        assert (caught.value.status_code, caught.value.body["code"]) == (504, "deadline_exceeded")
        with pytest.raises(openai.APIError, match="was not answered within 4 s") as streamed:
            list(ask(service, seed=2, stream=True))
        assert streamed.value.code == "deadline_exceeded"
        hold.let_go()
    wait_for(lambda: service.figure("cancelled_jobs_total", reason="deadline") == 2)
    wait_for(lambda: service.figure("running_jobs") == 0)
    assert hold.forwards == 1
    assert service.figure("requests_total", path="/v1/images/edits", status="504") == 1
    service.server.settings = replace(service.server.settings, deadline=PATIENCE)
    assert seeds(ask(service, 5)) == [5]


# Who leaves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_work_stops_before_the_next_step_when_the_client_hangs_up(service, shared_pipe, stream):
    cancelled = service.figure("cancelled_jobs_total", reason="client")
    with held(shared_pipe) as hold:
        fields = [*FIELDS.items(), ("num_inference_steps", "50"), ("stream", str(stream).lower()), ("image", png())]
        connection = raw(service, fields)
        assert hold.entered.wait(PATIENCE)
        connection.close()
        wait_for(lambda: service.figure("cancelled_jobs_total", reason="client") == cancelled + 1)
        hold.let_go()
        wait_for(lambda: service.figure("running_jobs") == 0)
        assert hold.forwards == 1
    assert seeds(ask(service, 6)) == [6]


def test_who_hangs_up_while_waiting_makes_room(service, shared_pipe, pool):
    with held(shared_pipe) as hold:
        running = pool.submit(ask, service, 0)
        assert hold.entered.wait(PATIENCE)
        connections = [raw(service, [*FIELDS.items(), ("seed", str(seed)), ("image", png(seed))]) for seed in (1, 2, 3)]
        wait_for(lambda: service.figure("queue_jobs") == 3)
        for connection in connections:
            connection.close()
        wait_for(lambda: service.figure("queue_jobs") == 0)
        hold.let_go()
        assert seeds(running.result(PATIENCE)) == [0]
        assert hold.forwards == 2  # the steps of the one


def test_one_of_two_who_are_served_together_may_leave(service, shared_pipe, pool):
    with held(shared_pipe) as hold:
        first = pool.submit(ask, service, 0, png(8))
        assert hold.entered.wait(PATIENCE)
        leaving = raw(service, [*FIELDS.items(), ("seed", "1"), ("image", png(9))])
        wait_for(lambda: service.figure("queue_jobs") == 1)
        staying = pool.submit(ask, service, 2, png(9))
        wait_for(lambda: service.figure("queue_jobs") == 2)
        hold.entered.clear()
        hold.let_go()
        first.result(PATIENCE)
        leaving.close()
        assert seeds(staying.result(PATIENCE)) == [2]


# Who comes back -------------------------------------------------------------------------------------------------------


def test_a_job_that_a_clients_retry_sends_again_is_run_once(service, shared_pipe, pool):
    joined = service.figure("joined_requests_total")
    with held(shared_pipe) as hold:
        # Its read timeout passes while the pipeline is held, so it hangs up and sends the same again
        hasty = pool.submit(ask, service, 3, client=service.client(max_retries=2, timeout=1.0))
        wait_for(lambda: service.figure("joined_requests_total") > joined)
        hold.let_go()
        assert seeds(hasty.result(PATIENCE)) == [3]
        assert hold.forwards == 2
    assert service.figure("requests_total", path="/v1/images/edits", status="499") >= 1


def test_a_retry_without_a_seed_gets_the_seed_of_the_first_try(service, shared_pipe, pool):
    joined = service.figure("joined_requests_total")
    with held(shared_pipe) as hold:
        first = pool.submit(send, service)
        assert hold.entered.wait(PATIENCE)
        other = pool.submit(send, service)
        wait_for(lambda: service.figure("queue_jobs") == 1)
        second = pool.submit(send, service, **AGAIN)
        wait_for(lambda: service.figure("joined_requests_total") == joined + 1)
        hold.let_go()
        first, second, other = (each.result(PATIENCE) for each in (first, second, other))
    assert seeds(first) == seeds(second) != seeds(other)
    assert first.data[0].b64_json == second.data[0].b64_json


def test_of_several_tries_without_a_seed_a_retry_gets_the_one_that_its_client_left(service, shared_pipe, pool):
    with held(shared_pipe) as hold:
        first = pool.submit(send, service)
        assert hold.entered.wait(PATIENCE)
        leaving = raw(service, [*FIELDS.items(), ("image", png(5))], {"x-stainless-read-timeout": "0"})
        wait_for(lambda: service.figure("queue_jobs") == 1)
        leaving.close()
        wait_for(lambda: any(job.is_alone for job in service.worker._known))
        left = next(job.seeds for job in service.worker._known if job.is_alone)
        again = pool.submit(send, service, **AGAIN)
        wait_for(lambda: not any(job.is_alone for job in service.worker._known))
        hold.let_go()
        assert seeds(again.result(PATIENCE)) == [*left] != seeds(first.result(PATIENCE))


def test_what_was_done_while_the_client_was_away_waits_for_it(service, shared_pipe):
    kind, body = multipart([*FIELDS.items(), ("image", png(6))])
    headers = {"Content-Type": kind, "Idempotency-Key": "a"}
    with held(shared_pipe) as hold:
        connection = raw(service, [*FIELDS.items(), ("image", png(6))], {"Idempotency-Key": "a"})
        assert hold.entered.wait(PATIENCE)
        connection.close()
        wait_for(lambda: [job for job in service.worker._known if job.is_alone])
        hold.let_go()
        wait_for(lambda: service.figure("running_jobs") == 0)
        assert service.get("/v1/images/edits", headers, "POST", body)[0] == 200
        assert hold.forwards == 2
    wait_for(lambda: not service.worker._known)


def test_the_same_key_for_another_request_is_another_job(service):
    answers = []
    for prompt in ("the cat", "the room"):
        kind, body = multipart([("prompt", prompt), ("image", png())])
        answers.append(service.get("/v1/images/edits", {"Content-Type": kind, "Idempotency-Key": "b"}, "POST", body)[2])
    assert answers[0] != answers[1]


def test_nobody_who_does_not_come_back_keeps_a_job_alive(serve, shared_pipe):
    service = serve(grace=0.2)
    with held(shared_pipe) as hold:
        connection = raw(service, [*FIELDS.items(), ("image", png())], {"Idempotency-Key": "a"})
        assert hold.entered.wait(PATIENCE)
        connection.close()
        wait_for(lambda: service.figure("cancelled_jobs_total", reason="client") == 1)
        hold.let_go()
        wait_for(lambda: service.figure("running_jobs") == 0)
        assert hold.forwards == 1
    assert service.worker._known == []


# What is made together ------------------------------------------------------------------------------------------------


def test_requests_about_the_same_references_are_made_by_one_call(service, shared_pipe, pool):
    calls = service.figure("batch_jobs_bucket", le="2.0") - service.figure("batch_jobs_bucket", le="1.0")
    with held(shared_pipe) as hold:
        first = pool.submit(ask, service, 0, png(7))
        assert hold.entered.wait(PATIENCE)
        same = [pool.submit(ask, service, seed, png(1), prompt=f"the cat {seed}") for seed in (1, 2)]
        wait_for(lambda: service.figure("queue_jobs") == 2)
        other = pool.submit(ask, service, 3, png(1), extra={"keep": 0.3})
        wait_for(lambda: service.figure("queue_jobs") == 3)
        hold.let_go()
        first, *same, other = (each.result(PATIENCE) for each in (first, *same, other))
        assert hold.forwards == 2 + 2 + 2
    assert [together(answer) for answer in (first, *same, other)] == [1, 2, 2, 1]
    assert service.figure("batch_jobs_bucket", le="2.0") - service.figure("batch_jobs_bucket", le="1.0") == calls + 1
    for answer, seed in zip(same, (1, 2), strict=True):
        single = ask(service, seed, png(1), prompt=f"the cat {seed}")
        difference = np.asarray(opened(answer.data[0])).astype(int) - np.asarray(opened(single.data[0]))
        assert np.abs(difference).max() <= 1


def test_what_one_of_them_breaks_does_not_hurt_the_other(service, shared_pipe, pool, monkeypatch):
    encode = shared_pipe.encode_prompt

    def fail(prompt, **rest):
        assert "bad" not in str(prompt), "a defect"
        return encode(prompt, **rest)

    monkeypatch.setattr(shared_pipe, "encode_prompt", fail)
    with held(shared_pipe) as hold:
        first = pool.submit(ask, service, 0, png(7))
        assert hold.entered.wait(PATIENCE)
        good = pool.submit(ask, service, 1, png(1))
        wait_for(lambda: service.figure("queue_jobs") == 1)
        bad = pool.submit(ask, service, 2, png(1), prompt="bad")
        wait_for(lambda: service.figure("queue_jobs") == 2)
        hold.let_go()
        first.result(PATIENCE)
        assert seeds(good.result(PATIENCE)) == [1]
        with pytest.raises(openai.InternalServerError, match="Flux2KleinPipeline failed: a defect.") as caught:
            bad.result(PATIENCE)
    assert caught.value.body["code"] == "generation_failed"


def test_references_that_come_again_are_encoded_once(service, shared_pipe):
    hits = service.figure("cache_lookups_total", result="hit")
    ask(service, 1, png(20))
    ask(service, 2, png(20))
    assert service.figure("cache_lookups_total", result="hit") >= hits + 2


def test_a_trial_at_the_start_chooses_how_many_are_made_together(serve):
    service = serve(batch=None)
    tried = {pictures: service.figure("batch_trial_seconds", pictures=str(pictures)) for pictures in (1, 2, 4)}
    assert all(seconds > 0 for seconds in tried.values())
    best = 1
    for pictures in (2, 4):
        best = pictures if tried[pictures] < 0.95 * tried[best] else best
    assert service.worker.batch == best


# How it ends ----------------------------------------------------------------------------------------------------------


def test_what_was_begun_is_finished_when_the_server_stops(make_engine, shared_pipe, pool):
    from server.shared import Service

    service = Service(make_engine(), queue=3)
    with held(shared_pipe) as hold:
        answers = [pool.submit(ask, service, seed, png(seed)) for seed in range(3)]
        wait_for(lambda: service.figure("queue_jobs") == 2)
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        wait_for(lambda: not service.uvicorn.servers[0].is_serving())
        hold.let_go()
        assert sorted(seeds(answer.result(PATIENCE))[0] for answer in answers) == [0, 1, 2]
        stopping.join(PATIENCE)
    assert not any(thread.is_alive() for thread in service.worker._threads)
    with pytest.raises(openai.APIConnectionError):
        ask(service)


def test_what_is_not_finished_in_time_is_told_so(serve, shared_pipe, pool):
    service = serve()
    with held(shared_pipe) as hold:
        answers = [pool.submit(ask, service, seed, png(seed)) for seed in range(2)]
        wait_for(lambda: service.figure("queue_jobs") == 1)
        assert hold.entered.wait(PATIENCE)
        threading.Thread(target=service.worker.stop).start()
        for answer in answers:
            with pytest.raises(openai.InternalServerError, match="The server is stopping") as caught:
                answer.result(PATIENCE)
            assert caught.value.status_code == 503
        assert service.get("/ready")[0] == 503 and service.get("/health")[0] == 200
        with pytest.raises(openai.InternalServerError, match="The server is stopping"):
            ask(service, 9)
        hold.let_go()
    assert hold.forwards == 1


def test_requests_wait_while_the_model_loads(make_engine, monkeypatch):
    from server.shared import Service

    engine, load = make_engine(), threading.Event()
    warm_up = engine.warm_up
    monkeypatch.setattr(engine, "warm_up", lambda: (load.wait(PATIENCE), warm_up()))
    monkeypatch.setattr("server.shared.wait_for", lambda condition: time.sleep(0.1))
    service = Service(engine, queue=3)
    with ThreadPoolExecutor(1) as pool:
        wait_for(lambda: service.get("/health")[0] == 200)
        assert service.get("/ready")[:1] == (503,)
        answer = pool.submit(ask, service, 1)
        wait_for(lambda: service.figure("queue_jobs") == 1)
        load.set()
        assert np.asarray(opened(answer.result(PATIENCE).data[0])).shape == pixels().shape
    assert service.get("/ready")[0] == 200
    service.stop()
