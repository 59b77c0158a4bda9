"""Which worker makes which job."""

from hypothesis import given
from hypothesis import strategies as st

from sparse_context.batch.jobs import Job
from sparse_context.batch.queue import Queue
from sparse_context.pipelines.settings_file import Settings
from sparse_context.samples import Sample


def job(name, *references):
    return Job("line 1", Sample(name, "x", references), Settings())


def names(queue, worker, count):
    taken = [queue.take(worker) for _ in range(count)]
    return [each and each.name for each in taken]


def test_jobs_that_share_a_reference_go_to_one_worker():
    queue = Queue(
        [job("1", "cat", "room"), job("2", "dog", "room"), job("3", "cat", "sea"), job("4", "dog"), job("5", "cat")]
    )
    taken = [(worker, queue.take(worker).name) for worker in (0, 1, 0, 1, 0)]
    assert taken == [(0, "1"), (1, "2"), (0, "3"), (1, "4"), (0, "5")]
    assert queue.take(0) is None and len(queue) == 0


def test_a_worker_without_a_group_helps_where_most_is_left():
    queue = Queue([job(str(i), "cat") for i in range(4)] + [job("dog", "dog")])
    assert names(queue, 0, 1) == ["0"] and names(queue, 1, 1) == ["dog"]
    assert names(queue, 1, 2) == ["1", "2"] and names(queue, 0, 2) == ["3", None]


def test_a_job_that_is_put_back_goes_first_and_a_group_is_free_once_its_worker_is_gone():
    queue = Queue([job("1", "cat"), job("2", "cat"), job("3", "dog"), job("4", "dog")])
    first = queue.take(0)
    queue.put_back(first)
    queue.leave(0)
    assert len(queue) == 4
    assert names(queue, 1, 4) == ["1", "2", "3", "4"]


def test_jobs_without_references_are_shared_out():
    queue = Queue([job(str(i)) for i in range(4)])
    assert names(queue, 0, 2) == ["0", "1"] and names(queue, 1, 3) == ["2", "3", None]


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=3), max_size=12),
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=60),
)
def test_every_job_is_taken_once_however_workers_come_and_go(references, events):
    queue = Queue([job(str(i), *each) for i, each in enumerate(references)])
    taken, back = [], 0
    for worker, dies in events:
        each = queue.take(worker)
        if each is None:
            assert len(queue) == 0
        elif dies:
            queue.leave(worker)
            queue.put_back(each)
            back += 1
        else:
            taken.append(each.name)
    while (each := queue.take(0)) is not None:
        taken.append(each.name)
    assert sorted(taken) == sorted(str(i) for i in range(len(references)))
