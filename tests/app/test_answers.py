"""What a page begins: pictures, dense beside sparse, sweeps; and how it ends."""

import base64
import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sparse_context.app import answers
from sparse_context.app.scene import Scene
from sparse_context.app.sessions import MOST_SESSIONS, Loaded, Session, Sessions, stepwise
from sparse_context.pipelines import Cancelled, GenerationError
from sparse_context.pipelines.engine import all_tokens


def pictures(html):
    """The pictures in HTML, as arrays."""
    found = re.findall(r'<img [^>]*src="data:image/\w+;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


@pytest.fixture
def scene(spec, cat, room):
    return Scene([cat, room], "the cat", spec, call={"steps": 3})


def all_of(answered):
    return list(answered)


# Dense beside sparse --------------------------------------------------------------------------------------------------


def test_both_pictures_are_those_of_the_engine(engine, scene):
    answered = all_of(answers.answer(engine, scene, Session(), compare=True))
    dense, sparse = pictures(answered[-1].result)
    assert np.array_equal(sparse, np.asarray(engine(scene.request()).image))
    assert np.array_equal(dense, np.asarray(engine(all_tokens(scene.request())).image))
    assert not np.array_equal(sparse, dense)
    told = "".join(answer.status for answer in answered)
    assert all(f"With the kept tokens: step {step} of 3" in told for step in (1, 2, 3))
    assert all(f"With all tokens: step {step} of 3" in told for step in (1, 2, 3))
    assert answered[-1].status == ""
    rows = re.findall(
        r"<th scope=row>(.*?)</th><td>([\d.]+)</td><td>([\d.]+)</td><td>(\d+)</td><td>([\d,]+ MiB)?</td>",
        answered[-1].figures,
    )
    assert [(row[0], row[3]) for row in rows] == [("all tokens", "128"), ("kept tokens", "26")]
    assert re.search(r"<b>[\d.]+x</b> as fast", answered[-1].figures)


def test_the_sparse_picture_is_shown_while_the_dense_one_is_made(engine, scene):
    answered = all_of(answers.answer(engine, scene, Session(), compare=True))
    shown = [len(pictures(answer.result)) for answer in answered if answer.result]
    assert shown == [1, 2]


def test_the_dense_picture_is_made_once_for_the_same_scene(engine, scene, monkeypatch):
    session, calls = Session(), []
    all_of(answers.answer(engine, scene, session, compare=True))
    call = type(engine).__call__
    monkeypatch.setattr(
        type(engine), "__call__", lambda self, request, **how: calls.append(request) or call(self, request, **how)
    )
    other = Scene(scene.references, scene.prompt, scene.spec, keep=0.2, call=scene.call)
    (answer,) = [each for each in answers.answer(engine, other, session, compare=True) if each.result]
    assert len(pictures(answer.result)) == 2
    assert [request.config.keep for request in calls] == [0.2]
    session.show([Loaded("new.png", scene.references[0].picture)])  # other references: nothing is remembered
    all_of(answers.answer(engine, other, session, compare=True))
    assert [request.config.keep for request in calls[1:]] == [0.2, 1.0]


def test_without_references_there_is_nothing_to_compare(engine, spec):
    answered = all_of(answers.answer(engine, Scene((), "the cat", spec), Session(), compare=True))
    assert len(pictures(answered[-1].result)) == 1
    assert "no references" in answered[-1].figures and "as fast" not in answered[-1].figures


def test_what_the_model_does_not_take_is_said_in_its_own_words(engine, spec, cat):
    with pytest.raises(ValueError, match="^There are 4 references, and this model takes at most 3: pass fewer.$"):
        all_of(answers.answer(engine, Scene([cat] * 4, "the cat", spec), Session(), compare=True))
    with pytest.raises(ValueError, match="^height is 60: this model needs a multiple of 8, such as 64.$"):
        all_of(answers.answer(engine, Scene([cat], "the cat", spec, call={"height": 60}), Session(), compare=False))


def test_a_call_that_fails_leaves_no_bar(engine, scene, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(engine.pipe().vae, "decode", fail)
    answered = []
    with pytest.raises(GenerationError, match="failed: a defect"):
        for answer in answers.answer(engine, scene, Session(), compare=False):
            answered.append(answer)
    assert answered[-1].status == "" and "progress" in answered[-2].status


# Sweeps ---------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_a_grid_of_keeps_and_selectors(engine, scene):
    answered = all_of(answers.sweep(engine, scene, Session(), [0.1, 40], [None, "uniform", {"edges": 1.0}]))
    shown = [len(pictures(answer.result)) for answer in answered if answer.result]
    assert shown == [1, 2, 3, 4, 5, 6, 7]
    assert answered[-1].status == "7 images."
    last = [answer.result for answer in answered if answer.result][-1]
    assert re.findall(r"<th scope=col>(.*?)</th>", last) == ["", "keep 0.1", "keep 40"]
    assert re.findall(r"<small>(\d+) tokens", last) == ["128", "12", "40", "12", "40", "12", "40"]
    assert last.count("dB to all tokens") == 6


def test_sweeps_that_are_none(engine, scene, spec):
    with pytest.raises(ValueError, match="^The sweep is empty: enter at least one keep and choose a selector.$"):
        all_of(answers.sweep(engine, scene, Session(), [], [None]))
    with pytest.raises(ValueError, match="^The sweep has 90 images: ask for 64 at most.$"):
        all_of(answers.sweep(engine, scene, Session(), [0.1] * 9, [None] * 10))
    with pytest.raises(ValueError, match="^A sweep varies what is kept of references, and there are none"):
        all_of(answers.sweep(engine, Scene((), "the cat", spec), Session(), [0.1], [None]))
    with pytest.raises(ValueError, match="^keep is 3.5: pass a ratio above 0 and up to 1"):
        all_of(answers.sweep(engine, scene, Session(), [0.1, 3.5], [None]))


# The end --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [
    lambda engine, scene, session: answers.answer(engine, scene, session, compare=True),
    lambda engine, scene, session: answers.sweep(engine, scene, session, [0.1, 0.2], [None]),
], ids=["picture", "sweep"])  # fmt: skip
def test_work_stops_within_a_step(engine, spec, cat, begin, monkeypatch):
    """The model's own scheduler counts the steps: none comes after the one in which it was cancelled."""
    scene, session = Scene([cat], "the cat", spec, call={"steps": 500}), Session()
    scheduler, steps = engine.pipe().scheduler, []
    step = scheduler.step

    def counted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            session.cancel.set()
        return step(*args, **kwargs)

    monkeypatch.setattr(scheduler, "step", counted)
    answered = all_of(begin(engine, scene, session))
    assert answered[-1].status.startswith("Stopped.")
    assert len(steps) == 5


def test_whoever_stops_listening_stops_the_work(engine, spec, cat):
    session = Session()
    answered = answers.answer(engine, Scene([cat], "the cat", spec, call={"steps": 500}), session, compare=False)
    for _ in range(4):
        next(answered)
    answered.close()  # which returns when the work has ended
    assert session.cancel.is_set()
    assert all_of(answers.answer(engine, Scene([cat], "the cat", spec), Session(), compare=False))[-1].result


def test_what_a_page_begins_ends_what_it_began_before(engine, spec, cat):
    session, started = Session(), threading.Event()

    def long():
        answered = []
        for answer in answers.answer(
            engine, Scene([cat], "the cat", spec, call={"steps": 500}), session, compare=False
        ):
            answered.append(answer)
            if "step 2 of" in answer.status:
                started.set()
        return answered[-1].status

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(long)
        started.wait()
        assert all_of(answers.answer(engine, Scene([cat], "the cat", spec), session, compare=False))[-1].result
        assert first.result() == "Stopped."


def test_what_waits_for_its_turn_can_be_stopped():
    hold, running = threading.Event(), threading.Event()

    def wait(progress):
        running.set()
        return hold.wait()

    cancel = threading.Event()
    cancel.set()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: list(stepwise(wait, threading.Event())))
        running.wait()
        with pytest.raises(Cancelled):
            list(stepwise(lambda progress: 1, cancel))
        hold.set()
        assert first.result() == [True]


# Sessions -------------------------------------------------------------------------------------------------------------


def test_a_page_that_is_closed_is_forgotten():
    sessions = Sessions()
    session = sessions.start("a")
    session.show([Loaded("cat.png", Image.new("RGB", (8, 8)))])
    assert sessions.of("a") is session is sessions.start("a")
    sessions.close("a")
    sessions.close("a")
    assert session.cancel.is_set()
    assert len(sessions) == 0
    with pytest.raises(ValueError, match="^The app no longer holds the images of this page: reload the page.$"):
        sessions.of("a")
    assert sessions.start("a").pictures == []


def test_there_are_so_many_sessions_at_most():
    sessions = Sessions()
    first, *_ = [sessions.start(str(i)) for i in range(MOST_SESSIONS + 1)]
    assert len(sessions) == MOST_SESSIONS
    assert first.cancel.is_set() and not sessions.of("1").cancel.is_set()
    sessions.close_all()
    assert len(sessions) == 0
