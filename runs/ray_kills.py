"""What is lost when a process of Ray dies in the middle of its work: a replica of the server, an actor of a batch.

    python runs/ray_kills.py [--requests 40] [--jobs 16] [--output results/ray_kills.json]

Two replicas on this machine, `sparse-context serve --ray`, before several clients at once. One that is at a call
is killed; what clients get is counted by status, and the pictures are compared with those of an `Engine`. Then
`sparse-context batch --ray` with two actors, of which one is killed; its pictures are compared, byte for byte, with
those of the plain batch. Ray listens on all interfaces: as root on Linux, all of it runs in a network of its own.
"""

import argparse
import base64
import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tables import draw, machine, read, table

from sparse_context.batch.folder import TRIES
from sparse_context.embedded.demo import EXAMPLES
from sparse_context.images import open_picture
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.settings_file import parse_settings
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "sparse_context"]
ALONE = "SPARSE_CONTEXT_ALONE"  # set where the network is our own
REFERENCES = ("in-front-1.webp", "in-front-2.webp")
PROMPT = "The object of image 1 in front of image 2."
PATIENCE = 600.0


def go_alone() -> None:
    """Start this script again in a network of its own, where that can be."""
    if ALONE in os.environ or sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        return
    os.environ[ALONE] = "1"
    script = 'ip link set lo up && exec "$@"'
    os.execvp("unshare", ["unshare", "-n", "sh", "-c", script, "sh", sys.executable, *sys.argv])


def processes(title: str) -> list[int]:
    """The processes of Ray with this title, below this one."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if title in (folder / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return [pid for pid in found if is_ours(pid)]


def is_ours(pid: int) -> bool:
    """Whether a process is in our own network, which no other Ray is in; or there is no such network."""
    try:
        return ALONE not in os.environ or os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")
    except OSError:
        return False


def busy(pids: list[int]) -> int:
    """The one that has computed most in a moment: the one that is at a call."""

    def ticks(pid: int) -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]))

    before = {pid: ticks(pid) for pid in pids}
    time.sleep(0.3)
    return max(before, key=lambda pid: ticks(pid) - before[pid])


# The server -----------------------------------------------------------------------------------------------------------


def post(port: int, fields: dict, files: list[bytes]) -> tuple[int, dict]:
    """Status and body of POST /v1/images/edits."""
    edge = b"a-boundary-of-these-parts"
    parts = [f'form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts += [b'form-data; name="image[]"; filename="a"\r\n\r\n' + file for file in files]
    body = (
        b"".join(b"--" + edge + b"\r\nContent-Disposition: " + part + b"\r\n" for part in parts) + b"--" + edge + b"--"
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"Content-Type": f"multipart/form-data; boundary={edge.decode()}"}
    try:
        connection.request("POST", "/v1/images/edits", body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def until(true, process: subprocess.Popen) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE
    while not true():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"It did not come to pass: {process.communicate()[1][-2000:]!r}")
        time.sleep(0.1)


def kill_a_replica(arguments: argparse.Namespace, options: list[str]) -> dict:
    """Requests by several clients, while a replica is killed that is at one of them."""
    port = 8123
    command = [*COMMAND, "serve", "--ray", "--replicas", "2", "--port", str(port), *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    stderr: list[bytes] = []
    try:
        until(lambda: get(port, "/ready")[0] == 200, server)
        threading.Thread(target=lambda: stderr.extend(server.stderr), daemon=True).start()
        files = [(EXAMPLES / name).read_bytes() for name in REFERENCES]

        def ask(seed: int) -> tuple[int, dict]:
            fields = {"prompt": PROMPT, "seed": seed, "keep": 0.2, "num_inference_steps": arguments.steps}
            return post(port, fields, files)

        with ThreadPoolExecutor(arguments.clients) as pool:
            asked = [pool.submit(ask, seed) for seed in range(arguments.requests)]
            until(lambda: sum(each.done() for each in asked) >= 2, server)
            killed = busy(processes("ray::ServeReplica:sparse-context:replica"))
            os.kill(killed, signal.SIGKILL)
            start = time.perf_counter()
            answers = [each.result() for each in asked]
            until(lambda: len(processes("ray::ServeReplica:sparse-context:replica")) == 2, server)
            replaced = time.perf_counter() - start
        figures = get(port, "/metrics")[1].decode().splitlines()
        retried = next(line for line in figures if line.startswith("sparse_context_retried_calls_total "))
        engine = Engine(parse_settings({**arguments.spec}).spec, bar=False)
        references = [open_picture(EXAMPLES / name) for name in REFERENCES]
        same = 0
        for seed, (status, body) in enumerate(answers):
            if status == 200:
                wanted = parse_settings({"prompt": PROMPT, "seed": seed, "keep": 0.2, "steps": arguments.steps}).request
                alone = engine(type(wanted)(**{**vars(wanted), "references": references})).image
                made = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
                same += np.array_equal(np.asarray(alone.convert("RGB")), np.asarray(made.convert("RGB")))
        server.send_signal(signal.SIGINT)
        code = server.wait(PATIENCE)
    finally:
        server.kill()
    return {
        "requests": len(answers),
        "statuses": dict(Counter(str(status) for status, _ in answers)),
        "calls_made_again": int(float(retried.split()[1])),
        "same_as_an_engine": same,
        "seconds_until_replaced_and_all_answered": round(replaced, 1),
        "exit_code": code,
    }


# The batch ------------------------------------------------------------------------------------------------------------


def kill_an_actor(arguments: argparse.Namespace, options: list[str], place: Path) -> dict:
    """A batch of which an actor is killed, beside the plain batch."""
    references = [str(EXAMPLES / name) for name in REFERENCES]
    rows = [{"references": references, "prompt": PROMPT, "seed": seed} for seed in range(arguments.jobs)]
    (place / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [*options, "--steps", str(arguments.steps), "--json"]
    command = [*COMMAND, "batch", str(place / "jobs.jsonl"), "--workers", "2", *options]
    plain = json.loads(
        subprocess.run([*command, "--output", str(place / "plain")], check=True, capture_output=True).stdout
    )
    run = subprocess.Popen(
        [*command, "--ray", "--output", str(place / "ray")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        until(lambda: any((place / "ray").glob("*.png")), run)
        actors = processes("ray::MapWorker(Map(Actor))")
        at_work = (place / "ray" / "records").glob
        until(lambda: len([*at_work(f"*{TRIES}")]) == 2, run)  # between two jobs, a death costs no retry
        os.kill(actors[0], signal.SIGKILL)
        out, err = run.communicate(timeout=PATIENCE)
    finally:
        run.kill()
    if run.returncode:
        raise RuntimeError(err[-2000:].decode(errors="replace"))
    names = sorted(path.name for path in (place / "plain").glob("*.png"))
    same = sum((place / "plain" / name).read_bytes() == (place / "ray" / name).read_bytes() for name in names)
    return {
        "jobs": arguments.jobs,
        "plain": plain,
        "ray": json.loads(out),
        "same_bytes": same,
        "left_over": sorted(
            path.name
            for path in (place / "ray").rglob("*")
            if path.is_file() and path.suffix not in (".png", ".json", ".jsonl")
        ),
    }


def ray_kills() -> str:
    result = read("ray_kills")
    figures = result["figures"]
    replica, actor = figures["replica"], figures["actor"]
    rows = [
        [
            "a replica of two, under load",
            f"{replica['requests']} requests",
            f"{replica['statuses'].get('200', 0)} answered with 200",
            f"{replica['calls_made_again']}",
        ],
        [
            "an actor of two",
            f"{actor['jobs']} jobs",
            f"{actor['same_bytes']} pictures as those of the plain batch",
            f"{actor['ray']['retries']}",
        ],
    ]
    return f"{table(['killed', 'of', 'came to', 'made again'], rows)}\n\n{machine(result)}"


TABLES = {"ray_kills": ray_kills}


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a replica and an actor of Ray, and count what is lost.")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--model", help="a folder; the embedded model without it")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ray_kills.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)
    go_alone()

    arguments.spec = {"dtype": "float32", "device": "cpu"} | ({"model": arguments.model} if arguments.model else {})
    options = [part for name, value in arguments.spec.items() for part in (f"--{name}", str(value))]
    os.environ["OMP_NUM_THREADS"] = "1"
    figures: dict[str, dict] = {"replica": kill_a_replica(arguments, options)}
    print(figures["replica"])
    with tempfile.TemporaryDirectory() as name:
        figures["actor"] = kill_an_actor(arguments, options, Path(name))
    print(figures["actor"])
    config = {"replicas": 2, "actors": 2, "steps": arguments.steps, "clients": arguments.clients, **arguments.spec}
    write_result(arguments.output, "ray_kills", config, figures)
    if arguments.output.parent == ROOT / "results":
        draw(TABLES)


if __name__ == "__main__":
    main()
