"""Processes of a run that end together: where one dies, the others do not wait for it.

What they exchange for the training tells of a death late or never, by backend: with NCCL it takes as long as the
longest time that one may wait for another, which is hours. So each process holds a connection to the first one, over
which nothing is sent. The system closes it with the process, however that ends, and drops it within half a minute where
a machine is gone.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, cast

from .processes import Processes

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""After how many seconds of silence the system asks whether a machine is there, how often again, and how many times.
macOS has another name for the first."""

PATIENCE = 5.0  # seconds in which the processes of a run that fails in all of them may each say why

JOINING = 600.0  # seconds in which all of them come together

DONE, SAID = b"\n", b"!"
"""What a process says before it closes a connection: it is done, or the run ends and one says why. The dead do not."""


def meet_anew() -> None:
    """Where torchrun has started the processes of this machine again, let them meet in a store of their own.

    torch 2.13 hands on the store in which the dead wrote their addresses, and who reads one of these waits in vain.
    On several machines each counts its restarts by itself, so there only TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps,
    in torchrun's environment.
    """
    said = os.environ.get
    restarts = int(said("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts or said("TORCHELASTIC_USE_AGENT_STORE") != "True" or said("GROUP_WORLD_SIZE") != "1":
        return
    from torch.distributed import TCPStore

    host, key = os.environ["MASTER_ADDR"], f"sparse-context/{restarts}"
    store = TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False)
    if said("RANK") == "0":
        with socket.create_server((host, 0), family=socket.getaddrinfo(host, None)[0][0]) as free:
            store.set(key, str(free.getsockname()[1]))
    os.environ |= {"MASTER_PORT": store.get(key).decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}


@contextlib.contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """End this process, with exit code 2, where another of the run dies inside.

    One of those that are left says so in a sentence on stderr. What is written by then is whole: the run goes on from
    its last checkpoint. Where this process fails, the others end as well, and the sentence is its own. Raises OSError
    where the processes do not come together.
    """
    processes = Processes(accelerator)
    if processes.count == 1:
        yield
        return
    watch = _Watch(processes)
    try:
        yield
        watch.leave()
    except BaseException as error:
        # Where another died, what is exchanged fails here too: then the watch ends the process, in its sentence
        if isinstance(error, RuntimeError) and watch.lost.wait(PATIENCE):
            threading.Event().wait()
        watch.say(SAID)
        raise
    finally:
        watch.close()


class _Watch:
    """The connections of a process: in the first one those to all others, and in these that to the first."""

    def __init__(self, processes: Processes) -> None:
        self._count, self._rank = processes.count, processes.rank
        self.lost, self._closed = threading.Event(), threading.Event()
        self._peers = _connect(processes)
        self._thread = threading.Thread(target=self._look, name="together", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Be done. The first waits for all others, for they look at it."""
        if self._rank:
            self.say(DONE)
        else:
            self._thread.join()

    def say(self, word: bytes) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(word)

    def close(self) -> None:
        self._closed.set()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()

    def _look(self) -> None:
        """Until all others are done, or one is not and is gone."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = cast(socket.socket, key.fileobj)
                    try:
                        said = peer.recv(1)
                    except OSError:  # the system gave its machine up
                        said = b""
                    if self._closed.is_set():
                        return
                    if said != DONE:
                        return self._end(self._peers[peer], said)
                    selector.unregister(peer)

    def _end(self, rank: int, said: bytes) -> None:
        """End the process, unless it fails by itself as another did."""
        self.lost.set()
        if self._rank == 0:
            self.say(SAID)
        if said == SAID:
            if self._closed.wait(PATIENCE):
                return
        elif self._rank == (1 if rank == 0 else 0):
            print(  # below the bar, which may be there
                f"\nsparse-context: Process {rank} of {self._count} (counted from 0) died, and the run with it: start "
                "it again with --resume latest, and it goes on from its last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
        os._exit(2)


def _connect(processes: Processes) -> dict[socket.socket, int]:
    """The connections, and the process at the other end of each."""
    from accelerate.utils import broadcast_object_list

    if processes.rank:
        found: list[Any] = [None]
        host, port, token = broadcast_object_list(found)[0]
        try:
            first = socket.create_connection((host, port), JOINING)
            first.sendall(token + processes.rank.to_bytes(4, "big"))
        except OSError as error:
            raise OSError(
                f"Process {processes.rank} does not reach the first one at {host}:{port} ({error}): let processes of "
                "a run connect to each other, on all ports."
            ) from error
        peers = {first: 0}
    else:
        host, token = os.environ.get("MASTER_ADDR", "127.0.0.1"), secrets.token_bytes(16)
        family = socket.getaddrinfo(host, None)[0][0]
        peers = {}
        with socket.create_server((host, 0), family=family, backlog=processes.count) as server:
            server.settimeout(JOINING)
            broadcast_object_list([(host, server.getsockname()[1], token)])
            while len(peers) < processes.count - 1:
                try:
                    peer, _ = server.accept()
                except TimeoutError as error:
                    raise OSError(
                        f"Only {len(peers) + 1} of {processes.count} processes came together in {JOINING:g} seconds: "
                        "start the run again."
                    ) from error
                peer.settimeout(JOINING)
                hello = _read(peer, len(token) + 4)
                if hello.startswith(token):
                    peers[peer] = int.from_bytes(hello[-4:], "big")
                else:  # somebody else's
                    peer.close()
    for peer in peers:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peers


def _read(peer: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer where there are no more."""
    read = b""
    with contextlib.suppress(OSError):
        while len(read) < count and (more := peer.recv(count - len(read))):
            read += more
    return read
