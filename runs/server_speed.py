"""What the operator gains: requests a second under load, with a tenth of the reference tokens and with all of them.

    python runs/server_speed.py [--requests 16] [--clients 4] [--turns 3]

Every request has four references and its own noise. Clients ask again as soon as they are answered, so the queue is
never empty. Once the references are new in every request, so that nothing can be remembered; once they are the same in
all, so that the server encodes them once and makes several pictures by one call. Sparse and dense take turns.
"""

import argparse
import itertools
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import ImageEnhance
from served import Served, scene, served, written
from tables import draw, machine, read, table

from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
KEEPS = {"sparse": "0.1", "dense": "1"}
REFERENCES = ("new in each request", "the same in all")


def server_speed() -> str:
    """How many times as many requests a second a tenth of the tokens allows, by which references there are."""
    result = read("server_speed")
    figures = result["figures"]
    rows = []
    for references in REFERENCES:
        rates = figures[references]
        ratios = sorted(sparse / dense for sparse, dense in zip(rates["sparse"], rates["dense"], strict=True))
        spread = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([references, spread])
    return f"{table(['references', 'requests per second, against all tokens'], rows)}\n\n{machine(result)}"


TABLES = {"server_speed": server_speed}


def rate(server: Served, keep: str, requests: int, clients: int, fresh: itertools.count | None) -> float:
    """Requests a second. fresh: numbers for references that nobody sent before; None: always the same."""
    prompt, pictures = scene(4)
    lock = threading.Lock()

    def ask(seed: int) -> None:
        with lock:
            change = 1.0 if fresh is None else 0.7 + 0.0005 * next(fresh)
        images = [("image[]", written(ImageEnhance.Brightness(picture).enhance(change))) for picture in pictures]
        status, body = server.edit([("prompt", prompt), ("keep", keep), ("seed", str(seed)), *images])
        if status != 200:
            raise SystemExit(f"server_speed: a request ended in {status}: {body[:300]!r}")

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(requests)))
    return requests / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests a second with a tenth of the tokens and with all.")
    parser.add_argument("--requests", type=int, default=16, help="of each kind in each turn")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "server_speed.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    fresh = itertools.count()
    figures: dict[str, dict[str, list[float]]] = {each: {way: [] for way in KEEPS} for each in REFERENCES}
    with served("--deadline", "3600") as server:
        for keep in KEEPS.values():  # a first call pays for more than itself
            rate(server, keep, 1, 1, fresh)
        for _ in range(arguments.turns):
            for references in REFERENCES:
                for way, keep in KEEPS.items():
                    source = fresh if references == REFERENCES[0] else None
                    measured = rate(server, keep, arguments.requests, arguments.clients, source)
                    figures[references][way].append(measured)
                    print(f"{references}, {way}: {measured:.3f} requests/s")
        trial = {name: value for name, value in server.figures().items() if "batch" in name and "created" not in name}
    config = {name: getattr(arguments, name) for name in ("requests", "clients", "turns")}
    write_result(
        arguments.output, "server_speed", {**config, "keeps": KEEPS, "model": "embedded"}, {**figures, "batches": trial}
    )
    draw(TABLES)
    print(server_speed())


if __name__ == "__main__":
    main()
