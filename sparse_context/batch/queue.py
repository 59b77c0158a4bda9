"""Which worker makes which job: jobs that share a reference go to one worker, which encodes it once."""

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence

from .jobs import Job


class Queue:
    """Jobs that wait, in groups that share a reference; a worker takes group after group.

    A group is the jobs whose most recurring reference is the same; jobs without a reference are each a group of their
    own. A worker without a group of its own left helps with the one that has most jobs left.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        uses = Counter(reference for job in jobs for reference in set(job.sample.references))
        self._groups: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        for job in jobs:
            key: Hashable = max(job.sample.references, key=lambda each: uses[each], default=job.name)
            self._groups.setdefault(key, deque()).append(job)
        self._taken: dict[int, Hashable] = {}  # the group of each worker
        self._again: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._again) + sum(map(len, self._groups.values()))

    def take(self, worker: int) -> Job | None:
        """The next job for a worker; None where none waits."""
        if self._again:
            return self._again.popleft()
        key = self._taken.get(worker)
        if key not in self._groups:
            taken = set(self._taken.values())
            free = next((each for each in self._groups if each not in taken), None)
            key = free if free is not None else max(self._groups, key=lambda k: len(self._groups[k]), default=None)
        if key is None:
            return None
        self._taken[worker] = key
        job = self._groups[key].popleft()
        if not self._groups[key]:
            del self._groups[key]
        return job

    def put_back(self, job: Job) -> None:
        """A job is to be made again, before all others."""
        self._again.append(job)

    def leave(self, worker: int) -> None:
        """A worker is gone: its group is free for others."""
        self._taken.pop(worker, None)
