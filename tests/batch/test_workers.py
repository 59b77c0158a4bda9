"""Spawned workers that are really killed, and a command that is."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from batch.shared import ROWS, base_of, jobs_of, times_of, write_jobs
from sparse_context.batch.folder import Folder
from sparse_context.batch.run import make_missing, specs_of
from sparse_context.batch.runner import Runner
from sparse_context.batch.workers import Pool
from sparse_context.pipelines import GenerationError, ModelSpec

pytestmark = pytest.mark.slow

LONG = {"references": ["a.png", "c.png"], "prompt": "the slow cat", "name": "long", "steps": 150}


def until(true, seconds=300):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def killing(pool, name, times):
    """A thread that kills the worker that is at the job of this name, so many times; the ids of those it killed."""
    killed = []

    def kill():
        for _ in range(times):
            worker = until(
                lambda: next(
                    (
                        w
                        for w in [*pool.workers.values()]
                        if w.job and w.job.name == name and w.process.pid not in killed
                    ),
                    None,
                )
            )
            time.sleep(0.2)
            killed.append(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return killed


@pytest.fixture
def base(tiny_model):
    return base_of(tiny_model)


def run(folder, jobs, base, name, times, workers=2):
    pool = Pool([base.spec] * workers, folder, threads=1)
    with folder.opened():
        killed = killing(pool, name, times)
        summary = make_missing(jobs, folder, pool)
    assert len(killed) == times and multiprocessing.active_children() == []
    return summary


def test_a_worker_that_dies_costs_one_retry_of_one_job(tmp_path, base):
    jobs = jobs_of(tmp_path, [LONG, *ROWS], base)
    summary = run(Folder(tmp_path / "out"), jobs, base, "long", 1)
    assert (summary.made, summary.failed, summary.retries) == (5, [], 1)
    alone = Folder(tmp_path / "alone")
    with alone.opened():
        runner = Runner(base.spec, alone, threads=1)
        for job in jobs:
            runner(job)
    for job in jobs:
        assert (tmp_path / "out" / f"{job.name}.png").read_bytes() == alone.picture(job.name).read_bytes()
    assert not [name for name in times_of(tmp_path / "out") if name.endswith((".part", ".lock"))]


def test_a_job_at_which_two_workers_die_fails_and_the_rest_is_made(tmp_path, base):
    folder = Folder(tmp_path / "out")
    summary = run(folder, jobs_of(tmp_path, [LONG, *ROWS], base), base, "long", 2, workers=1)
    assert (summary.made, summary.retries) == (4, 1)
    (record,) = summary.failed
    assert (record["name"], record["reason"]) == ("long", "2 workers died at it, the last one by signal 9 (SIGKILL)")
    assert not folder.picture("long").exists()


def test_workers_that_die_while_they_load_end_the_run(tmp_path, base):
    folder = Folder(tmp_path / "out")
    pool = Pool([base.spec], folder, threads=1)

    def kill():
        seen = set()
        while len(seen) < 2:
            for child in multiprocessing.active_children():
                if child.pid not in seen:
                    seen.add(child.pid)
                    child.kill()
            time.sleep(0.02)

    threading.Thread(target=kill, daemon=True).start()
    said = "^2 workers died while they loaded the model .signal 9 .SIGKILL..: if memory ran out, pass fewer --workers.$"
    with folder.opened(), pytest.raises(GenerationError, match=said):
        make_missing(jobs_of(tmp_path, ROWS, base), folder, pool)
    assert multiprocessing.active_children() == []


def test_a_model_that_does_not_load_ends_the_run_in_its_sentence(tmp_path, tiny_model):
    base = base_of(tiny_model, lora="gone.safetensors")
    folder = Folder(tmp_path / "out")
    with folder.opened(), pytest.raises(ValueError, match="gone.safetensors"):
        make_missing(jobs_of(tmp_path, ROWS, base), folder, Pool([base.spec], folder, threads=1))
    assert multiprocessing.active_children() == []


def test_workers_have_devices_of_their_own(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [spec.device for spec in specs_of(ModelSpec(), None)] == ["cuda:0", "cuda:1"]
    assert [spec.device for spec in specs_of(ModelSpec(), 3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [spec.device for spec in specs_of(ModelSpec(device="cpu"), None)] == ["cpu"]
    with pytest.raises(ValueError, match="^workers is 0: pass a number from 1 to 1024.$"):
        specs_of(ModelSpec(), 0)


# The command ----------------------------------------------------------------------------------------------------------


def start(tmp_path, tiny_model, **piped):
    """The command on a file whose first job is short and whose second is long, once the first is done."""
    write_jobs(tmp_path, [ROWS[0], LONG | {"steps": 1000}, *ROWS[1:]])
    command = [sys.executable, "-m", "sparse_context", "batch", "jobs.jsonl", "--output", "out", "-m", str(tiny_model)]
    command += ["--dtype", "float32", "--device", "cpu", "--steps", "2"]
    group = {"start_new_session": True, "cwd": tmp_path}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **group)
    until(lambda: (tmp_path / "out" / "records" / "one.json").is_file() or run.poll() is not None)
    return command, run


def children(pid):
    """The processes below one, by Linux's own list."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(each) for each in listed]


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_pictures_have_the_format_that_is_asked_for(tmp_path, tiny_model):
    write_jobs(tmp_path, ROWS[:1])
    command = [sys.executable, "-m", "sparse_context", "batch", "jobs.jsonl", "--output", "out", "-m", str(tiny_model)]
    command += ["--dtype", "float32", "--device", "cpu", "--steps", "1", "--format", "webp"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (made,) = (tmp_path / "out").rglob("one.*p")
    with Image.open(made) as picture:
        assert picture.format == "WEBP"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_command_that_is_killed_leaves_no_worker_and_goes_on_where_it_was(tmp_path, tiny_model):
    command, run = start(tmp_path, tiny_model)
    workers, out = children(run.pid), tmp_path / "out"
    assert workers
    run.kill()
    run.communicate()
    until(lambda: not any(map(is_alive, workers)))
    assert not (out / "long.png").exists()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert done

    write_jobs(tmp_path, [ROWS[0], LONG, *ROWS[1:]])
    resumed = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert (summary["made"], summary["there"], summary["failed"]) == (5 - len(done), len(done), 0)
    now, names = times_of(out), ("one", "long", "000003", "000004", "000005")
    assert {name: now[name] for name in done} == done
    assert set(now) == {f"{name}.{kind}" for name in names for kind in ("png", "json")} | {"results.jsonl"}


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_an_interrupted_command_ends_quietly_with_whole_pictures(tmp_path, tiny_model):
    _, run = start(tmp_path, tiny_model)
    workers, out = children(run.pid), tmp_path / "out"
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of them
    said, err = run.communicate(timeout=300)
    assert run.returncode == 130 and said == b"" and b"Traceback" not in err
    until(lambda: not any(map(is_alive, workers)))
    assert set(times_of(out)) == {"one.png", "one.json"}
    with Image.open(out / "one.png") as picture:
        picture.load()
