"""What time does to the server: minutes of good and hostile requests, mixed.

    python runs/server_soak.py [--minutes 10] [--clients 6]

Each client draws one kind of request after the other: edits with one and with four references, streams with pictures on
the way, several pictures, prompts alone; broken pictures, bombs, wrong fields, bodies that are too large or no forms,
bodies that drip and are left, clients that hang up in the middle. No answer may be a 5xx or miss, the resident set must
be flat, and no file may be left. Flat: the median of the last quarter of the time is compared with that of the second.
"""

import argparse
import contextlib
import http.client
import json
import random
import socket
import statistics
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from served import PATIENCE, Served, error_of, multipart, scene, served, settled, written
from tables import draw, machine, read, table

from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]

STEPS = "4"


def server_soak() -> str:
    """Requests by what became of them, memory, and what was left."""
    result = read("server_soak")
    figures = result["figures"]
    statuses = Counter()
    for status, count in figures["statuses"].items():
        statuses["left" if status == "left" else f"{status[0]}xx"] += count
    head = [
        "minutes",
        "requests",
        "2xx",
        "4xx",
        "5xx",
        "left by the client",
        "memory, second quarter",
        "last",
        "ratio",
        "files left",
    ]
    memory = figures["memory"]
    row = [
        f"{figures['minutes']:g}",
        str(sum(figures["statuses"].values())),
        *(str(statuses[kind]) for kind in ("2xx", "4xx", "5xx", "left")),
        *(f"{memory[quarter]:.0f} MiB" for quarter in ("second", "last")),
        f"{memory['last'] / memory['second']:.3f}",
        str(len(figures["left_over"])),
    ]
    return f"{table(head, [row])}\n\n{machine(result)}"


TABLES = {"server_soak": server_soak}


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


class Client:
    """One who sends one request after the other, good and bad ones, by a random sequence of its own."""

    def __init__(self, server: Served, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.prompt, one = scene(1)
        self.prompts, four = scene(4)
        self.one, self.four = [written(each) for each in one], [written(each) for each in four]
        self.statuses: Counter[str] = Counter()
        self.kinds: list[tuple[int, Callable[[], int | None]]] = [
            (4, lambda: self.edit(self.one)),
            (2, lambda: self.edit(self.four, keep="0.1")),
            (1, lambda: self.edit(self.one, n="2")),
            (2, lambda: self.edit(self.one, stream="true", partial_images="2")),
            (1, self.generate),
            (2, lambda: self.edit([self.one[0][: self.random.randrange(len(self.one[0]))]])),
            (1, lambda: self.edit([self.bomb()])),
            (1, lambda: self.edit([b""])),
            (2, lambda: self.edit(self.one, **self.wrong())),
            (1, lambda: self.send(b"no form" * 1000)),
            (1, lambda: self.edit([self.random.randbytes(3 * 2**20)])),
            (1, lambda: self.edit([bytes(20 * 2**20)])),
            (2, self.drip),
            (2, self.hang_up),
            (1, lambda: self.talk(self.random.randbytes(200) + b"\r\n\r\n")),
            (1, lambda: self.server.ask("GET", "/metrics")[0]),
        ]

    def run(self, until: float) -> None:
        weights = [weight for weight, _ in self.kinds]
        while time.monotonic() < until:
            try:
                status = self.random.choices(self.kinds, weights)[0][1]()
                self.statuses["left" if status is None else str(status)] += 1
            except (OSError, http.client.HTTPException):
                status = None
                self.statuses["5xx or none"] += 1
            if status == 429:
                time.sleep(0.5)

    def edit(self, images: list[bytes], **fields: str) -> int:
        prompt = self.prompts if len(images) == 4 else self.prompt
        fields = {"prompt": prompt, "num_inference_steps": STEPS, **fields}
        kind, body = multipart([*fields.items(), *(("image[]", image) for image in images)])
        return self.send(body, kind)

    def send(self, body: bytes, kind: str = "multipart/form-data; boundary=limit") -> int:
        status, answer = self.server.ask("POST", "/v1/images/edits", body, {"Content-Type": kind})
        if status != 200:
            error_of(answer)
        return status

    def generate(self) -> int:
        body = json.dumps({"prompt": self.prompt, "num_inference_steps": int(STEPS)}).encode()
        return self.server.ask("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})[0]

    def wrong(self) -> dict[str, str]:
        """A field that no request has, or a value that none takes."""
        name, value = self.random.choice(
            [("keep", "9.5"), ("selector", "best"), ("n", "99"), ("size", "1x1x1"), ("url", "http://a/"), ("kep", "1")]
        )
        return {name: value}

    def bomb(self) -> bytes:
        head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6)))

    def talk(self, sent: bytes, wait: bool = True, pause: float = 0.0) -> int | None:
        """Send bytes; the status of what comes back, or None where nobody waits for it, or nothing comes."""
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE) as connection:
                connection.sendall(sent)
                time.sleep(pause)
                if wait and (received := connection.recv(12, socket.MSG_WAITALL)):
                    return int(received[9:12])
        return None

    def drip(self) -> None:
        head = b"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=limit"
        length = self.random.choice([b"Content-Length: 5000000", b"Transfer-Encoding: chunked"])
        part = b'--limit\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + bytes(2 * 2**20)
        self.talk(head + b"\r\n" + length + b"\r\n\r\n" + part, wait=False, pause=self.random.uniform(0, 2))

    def hang_up(self) -> None:
        kind, body = multipart([("prompt", self.prompt), ("num_inference_steps", "50"), ("image", self.one[0])])
        head = f"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
        sent = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.talk(sent, wait=False, pause=self.random.uniform(0, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Minutes of good and hostile requests, mixed.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "server_soak.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    with served("--max-body", "16", "--queue", "4", "--deadline", "600") as server:
        start, end = time.monotonic(), time.monotonic() + 60 * arguments.minutes
        clients = [Client(server, seed) for seed in range(arguments.clients)]
        files, there = server.open_files(), server.left_over()
        threads = [threading.Thread(target=client.run, args=(end,)) for client in clients]
        for thread in threads:
            thread.start()
        samples = []
        while any(thread.is_alive() for thread in threads):
            samples.append((round(time.monotonic() - start, 1), server.memory()))
            time.sleep(1)
        for thread in threads:
            thread.join()
        rest = settled(server)
        left_over, files_after = sorted({*server.left_over()} - {*there}), server.open_files()
        figures_of_server = server.figures()
    within = [(at, memory) for at, memory in samples if at <= 60 * arguments.minutes]
    quarter = len(within) // 4

    def median(part: list[tuple[float, float]]) -> float:
        return statistics.median(memory for _, memory in part)

    statuses: Counter[str] = sum((client.statuses for client in clients), Counter())
    figures = {
        "minutes": arguments.minutes,
        "statuses": dict(statuses),
        "memory": {
            "second": median(within[quarter : 2 * quarter]),
            "last": median(within[-quarter:]),
            "at_rest": rest,
            "samples": samples,
        },
        "left_over": left_over,
        "open_files": {"before": files, "after": files_after},
        "cancelled": {key: n for key, n in figures_of_server.items() if "cancelled_jobs_total" in key},
    }
    config = {"clients": arguments.clients, "steps": int(STEPS), "queue": 4, "model": "embedded"}
    write_result(arguments.output, "server_soak", config, figures)
    draw(TABLES)
    print(server_soak())
    failed = {status: count for status, count in statuses.items() if status.startswith("5")}
    ratio = figures["memory"]["last"] / figures["memory"]["second"]
    if failed or left_over or ratio > 1.1:
        raise SystemExit(f"server_soak: {failed or left_over or ratio} is not as it should be.")


if __name__ == "__main__":
    main()
