"""A runner: jobs into pictures, in this process."""

import json

import numpy as np
import pytest
from tiny import picture

from batch.shared import ROWS, base_of, jobs_of, times_of
from sparse_context.batch.folder import Folder
from sparse_context.batch.runner import Runner, threads_of
from sparse_context.images import WRITE_FORMATS, open_picture
from sparse_context.pipelines import Cancelled, Engine


@pytest.fixture
def base(tiny_model):
    return base_of(tiny_model)


@pytest.fixture
def runner(base, tmp_path):
    (tmp_path / "out" / "records").mkdir(parents=True)
    return Runner(base.spec, Folder(tmp_path / "out"))


def test_a_job_is_made_as_an_engine_makes_its_request(runner, base, tmp_path):
    jobs = jobs_of(tmp_path, ROWS, base)
    engine = Engine(pipe=runner.engine.pipe(), bar=False)
    for job in jobs:
        record = runner(job)
        generation = engine(job.read())
        assert np.array_equal(open_picture(tmp_path / "out" / record["output"]), generation.image)
        assert record == json.loads(runner.folder.record(job.name).read_text())
        assert record["status"] == "done" and record["weights"] == runner.weights
        kept = generation.selection and generation.selection.kept
        assert (record["selection"] and record["selection"]["kept"]) == kept


def test_references_that_recur_are_encoded_once(runner, base, tmp_path):
    rows = [{"references": pair, "prompt": p} for p in ("x", "y") for pair in (["a.png", "b.png"], ["b.png", "c.png"])]
    encoded = []
    handle = runner.engine.pipe().vae.encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    for job in jobs_of(tmp_path, rows, base):
        assert runner(job)["status"] == "done"
    handle.remove()
    assert len(encoded) == 3  # a, b and c, of eight


def test_a_job_that_fails_says_why_and_the_next_one_is_as_usual(runner, base, tmp_path):
    rows = [
        {"references": ["gone.png"], "prompt": "x"},
        {"references": ["a.png"], "prompt": "x", "height": 65},
        ROWS[0],
    ]
    gone, odd, good = jobs_of(tmp_path, rows, base)
    assert runner(gone)["reason"].endswith("does not exist; check the name and the folder")
    assert runner(odd)["reason"].startswith("height is 65: this model needs a multiple of 8")
    assert runner(good)["status"] == "done"
    record = json.loads(runner.folder.record(gone.name).read_text())
    assert (record["status"], record["where"]) == ("failed", "line 1") and not runner.folder.picture(gone.name).exists()
    picture(64, 64).save(tmp_path / "gone.png")
    assert runner(gone)["status"] == "done"


def test_a_picture_that_its_format_cannot_hold_is_a_failed_job(runner, base, tmp_path, monkeypatch):
    monkeypatch.setitem(WRITE_FORMATS, ".png", ("PNG", {}, 32))
    (job,) = jobs_of(tmp_path, [ROWS[0]], base)
    record = runner(job)
    assert (record["status"], record["reason"]) == (
        "failed",
        "The picture is 64x64 pixels, and .png holds 32 a side: choose png.",
    )


def test_a_job_that_is_done_is_not_made_again(runner, base, tmp_path):
    (job,) = jobs_of(tmp_path, ROWS[:1], base)
    first, times = runner(job), times_of(tmp_path / "out")
    forwards = []
    handle = runner.engine.pipe().transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert runner(job) == first
    handle.remove()
    assert not forwards and times_of(tmp_path / "out") == times


def test_a_cancelled_job_leaves_nothing(runner, base, tmp_path):
    (job,) = jobs_of(tmp_path, ROWS[:1], base)
    with pytest.raises(Cancelled):
        runner(job, cancel=lambda: True)
    assert times_of(tmp_path / "out") == {}


def test_other_weights_are_refused(runner, base, tmp_path):
    Runner(base.spec, runner.folder, weights=runner.weights)
    with pytest.raises(ValueError, match="were made with other weights than .*tiny klein has now: choose another --ou"):
        Runner(base.spec, runner.folder, weights="0" * 16)


def test_threads_are_what_the_environment_says_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of(1) == threads_of(8) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert (threads_of(1), threads_of(3), threads_of(16)) == (8, 2, 1)
