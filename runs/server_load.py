"""What a crowd does to the server: 200 requests at once against a queue of 16.

    python runs/server_load.py [--requests 200] [--queue 16]

The requests are edits of the embedded model with one reference each, all different, sent by as many threads at the same
moment, none of which tries again. Each must be answered by 200 or by 429 with a time, and afterwards the server must
have the memory that it had: its resident set is compared with idle, and with the most that one request adds to that.
"""

import argparse
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import ImageEnhance
from served import error_of, scene, served, settled, written
from tables import draw, machine, read, table

from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]


def server_load() -> str:
    """Answers by status, and the server's memory before, at one request, and after."""
    result = read("server_load")
    figures = result["figures"]
    rows = [
        [
            str(figures["requests"]),
            *(str(figures["statuses"].get(status, 0)) for status in ("200", "429")),
            str(sum(count for status, count in figures["statuses"].items() if status not in ("200", "429"))),
            *(f"{figures['memory'][when]:.0f} MiB" for when in ("idle", "one", "peak", "after")),
            f"{figures['growth']:.2f}",
        ]
    ]
    head = [
        "requests",
        "200",
        "429",
        "others",
        "idle",
        "with one request",
        "at the most",
        "afterwards",
        "of one request",
    ]
    return f"{table(head, rows)}\n\n{machine(result)}"


TABLES = {"server_load": server_load}


def main() -> None:
    parser = argparse.ArgumentParser(description="Many requests at once against a bounded queue.")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "server_load.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    prompt, (picture,) = scene(1)
    pictures = [
        written(ImageEnhance.Brightness(picture).enhance(0.5 + i / arguments.requests))
        for i in range(arguments.requests)
    ]
    together = threading.Barrier(arguments.requests)

    with served("--queue", str(arguments.queue), "--deadline", "3600") as server:

        def ask(i: int, wait: bool = True) -> tuple[int, float, bytes]:
            if wait:
                together.wait()
            start = time.monotonic()
            fields = [("prompt", prompt), ("num_inference_steps", str(arguments.steps)), ("image", pictures[i])]
            status, body = server.edit(fields)
            return status, time.monotonic() - start, body

        memory, there = {"idle": server.memory()}, server.left_over()
        ask(0, wait=False)
        peaks = [settled(server)]
        memory["one"] = peaks[0]
        running = threading.Event()

        def watch() -> None:
            while not running.wait(0.1):
                peaks.append(server.memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(arguments.requests) as pool:
            answers = list(pool.map(ask, range(arguments.requests)))
        running.set()
        watcher.join()
        memory |= {"peak": max(peaks), "after": settled(server)}
        left_over = sorted({*server.left_over()} - {*there})
    for status, _, body in answers:
        if status != 200:
            error_of(body)
    served_in = sorted(seconds for status, seconds, _ in answers if status == 200)
    refused_in = sorted(seconds for status, seconds, _ in answers if status == 429)
    figures = {
        "requests": arguments.requests,
        "statuses": dict(Counter(str(status) for status, *_ in answers)),
        "seconds": {"served": served_in[len(served_in) // 2], "refused": refused_in[len(refused_in) // 2]},
        "memory": memory,
        "growth": memory["after"] / memory["one"],
        "left_over": left_over,
    }
    config = {"queue": arguments.queue, "steps": arguments.steps, "model": "embedded"}
    write_result(arguments.output, "server_load", config, figures)
    draw(TABLES)
    print(server_load())
    others = set(figures["statuses"]) - {"200", "429"}
    if others or left_over or figures["growth"] > 1.3:
        raise SystemExit(f"server_load: {others or left_over or figures['growth']} is not as it should be.")


if __name__ == "__main__":
    main()
