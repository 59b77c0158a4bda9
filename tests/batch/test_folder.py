"""The output folder: what is done stays, what is half written goes."""

import json

import pytest
from tiny import picture

from batch.shared import ROWS, base_of, jobs_of
from sparse_context.batch.folder import Folder, digests
from sparse_context.batch.run import make_missing


@pytest.fixture
def jobs(tmp_path):
    return jobs_of(tmp_path, ROWS)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "out" / "deep")


class Saver:
    """Makes each job a picture of noise, by the number of its seed; counts."""

    retries = 0

    def __init__(self, folder):
        self.folder, self.made = folder, []

    def run(self, jobs, weights):
        for job in jobs:
            self.made.append(job.name)
            yield self.folder.save(job, picture(8, 8, 1), {"seconds": 1}, "weights", digests(job))


def make(jobs, folder):
    saver = Saver(folder)
    with folder.opened():
        summary = make_missing(jobs, folder, saver)
    return saver.made, summary


def test_what_is_done_is_not_made_again(jobs, folder):
    made, summary = make(jobs[:2], folder)
    assert made == ["one", "000002"] and (summary.made, summary.there) == (2, 0)
    times = {path: path.stat().st_mtime_ns for path in folder.path.glob("*.png")}
    made, summary = make(jobs, folder)
    assert made == ["000003", "000004"] and (summary.made, summary.there, summary.failed) == (2, 2, [])
    assert {path: path.stat().st_mtime_ns for path in times} == times
    lines = [json.loads(line) for line in (folder.path / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [job.name for job in jobs]
    assert {line["status"] for line in lines} == {"done"}
    assert make(jobs, folder)[0] == []


def test_a_picture_that_is_missing_is_made_again(jobs, folder):
    make(jobs, folder)
    folder.picture("one").unlink()
    assert make(jobs, folder)[0] == ["one"]


def test_a_kill_between_record_and_picture_leaves_a_job_to_make(jobs, folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("sparse_context.batch.folder.save_picture", killed)
        with pytest.raises(KeyboardInterrupt):
            make(jobs, folder)
    assert not folder.picture("one").exists()
    assert make(jobs, folder)[0] == [job.name for job in jobs]


def test_a_failure_is_tried_again(jobs, folder):
    with folder.opened():
        folder.fail(jobs[0], "no luck")
    assert json.loads(folder.record("one").read_text())["reason"] == "no luck"
    assert make(jobs[:1], folder)[0] == ["one"]
    assert json.loads(folder.record("one").read_text())["status"] == "done"


def test_a_picture_of_another_job_is_kept_and_the_job_is_refused(tmp_path, jobs, folder):
    make(jobs, folder)
    files = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    for changed, what in (
        (jobs_of(tmp_path, [ROWS[0] | {"prompt": "the dog"}]), "another prompt, model or settings"),
        (jobs_of(tmp_path, ROWS, base_of("another")), "another prompt, model or settings"),
    ):
        with pytest.raises(ValueError, match=f"one.png was made with {what} than line 1 says: give the job another"):
            make(changed, folder)
    picture(64, 64, 9).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="one.png was made with other pictures than line 1 says"):
        make(jobs, folder)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == files
    folder.picture("one").unlink()
    assert make(jobs, folder)[0] == ["one"]


def test_a_job_whose_reference_is_gone_stays_done(tmp_path, jobs, folder):
    make(jobs, folder)
    (tmp_path / "b.png").unlink()
    assert make(jobs, folder)[0] == []


def test_a_bad_line_is_in_the_results(tmp_path, folder):
    made, summary = make(jobs_of(tmp_path, [ROWS[0], "{", ROWS[1]]), folder)
    assert made == ["one", "000003"] and len(summary.failed) == 1
    lines = [json.loads(line) for line in (folder.path / "results.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == ["line 1", "line 2", "line 3"]
    assert lines[1]["status"] == "failed" and "is no JSON" in lines[1]["reason"]


def test_a_reference_that_leads_to_itself_stops_no_other_job(tmp_path, folder):
    (tmp_path / "loop.png").symlink_to("loop.png")
    (job, other) = jobs_of(tmp_path, [ROWS[0] | {"references": ["loop.png"], "name": "loop"}, ROWS[1]])
    assert make([job, other], folder)[0] == ["loop", other.name]  # by `Saver`, which opens nothing


def test_an_input_is_not_written_over(tmp_path, jobs):
    beside = Folder(tmp_path)
    job = jobs_of(tmp_path, [{"prompt": "x", "name": "a"}, ROWS[0]])
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="a.png is also an input and would be overwritten: choose another --output.$"):
        make(job, beside)
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize("record", [None, '{"status": "do', '{"status": "failed"}'])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_file_of_somebody_else_is_not_written_over(jobs, folder, resumed, record):
    """In a new folder, and in one that has pictures of the batch."""
    others = [job for job in jobs if job.name != "one"]
    if resumed:
        make(others, folder)
    folder.picture("one").parent.mkdir(parents=True, exist_ok=True)
    folder.picture("one").write_bytes(b"mine")
    if record is not None:
        folder.record("one").parent.mkdir(exist_ok=True)
        folder.record("one").write_text(record)
    with pytest.raises(ValueError, match="one.png is there, and no record says that this batch made it: choose anoth"):
        make(jobs, folder)
    assert folder.picture("one").read_bytes() == b"mine"
    folder.picture("one").unlink()
    assert make(jobs, folder)[0] == (["one"] if resumed else [job.name for job in jobs])


def test_one_batch_at_a_time_and_nothing_half_written_stays(jobs, folder):
    with folder.opened():
        (folder.path / f".{'0' * 16}.part").write_bytes(b"half")
        (folder.path / "records" / f".{'a' * 16}.part").write_bytes(b"half")
        (folder.path / ".mine.part").write_bytes(b"whole")
        with pytest.raises(ValueError, match="^Another batch is at work in .*deep: wait for it, or choose another"):
            with Folder(folder.path).opened():
                pass
    assert sorted(path.name for path in folder.path.rglob("*")) == [".mine.part", "records"]
    with folder.opened():
        pass


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be a folder .*: choose another one.$"):
        with Folder(tmp_path / "file").opened():
            pass
