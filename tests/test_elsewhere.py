"""Windows and macOS: what they lack or refuse is taken away (elsewhere.py), and the work is done all the same."""

import ast
import errno
import io
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from elsewhere import open_files, windows
from PIL import Image
from safetensors.torch import load_file
from test_finetune import SMALL, batches, example, klein
from tiny import picture

from sparse_context import result
from sparse_context.evaluation.evaluate import evaluate
from sparse_context.evaluation.grid import grid, maker
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.images import open_picture, put_in_place, save_picture, save_text
from sparse_context.pipelines.embedded import read_call_settings
from sparse_context.pipelines.load import load
from sparse_context.pipelines.memory import Peak
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.samples import Sample
from sparse_context.training.batch import Encoding
from sparse_context.training.cache import Cache
from sparse_context.training.card import LORA_FILE
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Ahead
from sparse_context.training.files import alone
from sparse_context.training.finetune import Run, Watch, finetune

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="stands for other systems on Linux")
PACKAGE = Path(__file__).parents[1] / "sparse_context"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("sparse_context.images.time.sleep", lambda seconds: None)


def test_what_stands_for_windows_refuses_what_that_refuses(tmp_path, monkeypatch):
    """Or the tests below would show nothing."""
    windows(monkeypatch)
    assert not hasattr(os, "fork") and not hasattr(os, "getloadavg") and not hasattr(signal, "SIGKILL")
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    (tmp_path / "folder").mkdir()
    for name in ("open", "free", "folder/open"):
        (tmp_path / name).write_text("x")
    with (tmp_path / "open").open(), (tmp_path / "folder" / "open").open() as inner:
        for act in (
            lambda: os.replace(tmp_path / "free", tmp_path / "open"),
            lambda: (tmp_path / "open").unlink(),
            lambda: (tmp_path / "folder").rename(tmp_path / "other"),
        ):
            with pytest.raises(PermissionError):
                act()
        with pytest.raises(OSError, match="Bad file"):
            os.fsync(inner.fileno())
    with pytest.raises(FileExistsError):
        (tmp_path / "free").rename(tmp_path / "open")
    (tmp_path / "free").replace(tmp_path / "open")


def test_a_run_is_killed_and_goes_on_and_its_result_loads(tmp_path, monkeypatch):
    """Checkpoints, log, pictures, caches, lock and result, with what Linux alone has taken away."""
    host = klein()
    host.pipe.register_to_config(_name_or_path=str(tmp_path))
    (tmp_path / "call.json").write_text(json.dumps({"num_inference_steps": 1, **host.settings}))
    config = TrainConfig(**SMALL | {"max_train_steps": 6, "checkpointing_steps": 1}, ema=0.5, validation_steps=3)

    def run(name, kill_at=99):
        def until_killed(number):
            if number >= kill_at:
                raise KeyboardInterrupt
            return batches(number)

        fresh = klein()
        fresh.pipe.register_to_config(_name_or_path=str(tmp_path))
        caches = {
            f"{kind}_cache": Cache(tmp_path / "cache" / kind, part)
            for kind, part in (("latent", fresh.pipe.vae), ("text", fresh.pipe.text_encoder))
        }
        with alone(tmp_path / name):
            return finetune(
                fresh,
                until_killed,
                Run(tmp_path / name, "tiny", "x", resume=True),
                config,
                encoding=Encoding(**caches),
                watch=Watch(validation=[example()], log_every=4),
            )

    whole = run("whole")
    with monkeypatch.context() as patch:
        windows(patch)
        with pytest.raises(KeyboardInterrupt):
            run("killed", kill_at=3)
        killed = run("killed")
        assert killed == run("killed")  # and again, over the result
    assert killed.read_bytes() == whole.read_bytes()
    names = {
        name: {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")}
        for name in ("whole", "killed")
    }
    assert names["whole"] == names["killed"]
    assert b"\r" not in (tmp_path / "killed" / "log.jsonl").read_bytes()


def test_all_weights_are_put_in_place_too(tmp_path, monkeypatch):
    windows(monkeypatch)
    config = TrainConfig(full=True, **SMALL | {"max_train_steps": 1})
    for _ in range(2):
        made = finetune(klein(), batches, Run(tmp_path, "tiny", "x", resume=True), config)
    assert (made / "sparse_context.json").is_file() and not list(tmp_path.glob("*.partial"))


def test_what_is_cached_can_be_replaced_while_it_is_used(tmp_path, monkeypatch):
    windows(monkeypatch)
    encoder = torch.nn.Linear(2, 2)
    cache = Cache(tmp_path, encoder)
    for _ in range(2):
        held = cache.get(b"key", lambda: {"x": torch.ones(3)})
    (file,) = tmp_path.rglob("*.safetensors")
    assert str(file) not in open_files() and held["x"].sum() == 3
    with file.open("rb"):  # another process reads it, and it is damaged
        with monkeypatch.context() as patch:
            patch.setattr("sparse_context.training.cache._digest", lambda *given: "another")
            assert cache.get(b"key", lambda: {"x": torch.ones(3)})["x"].sum() == 3
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [file.name]


def test_evaluation_writes_and_goes_on(tiny_model, tmp_path, monkeypatch):
    data = io.BytesIO()
    picture(64, 64).save(data, "png")
    samples = [Sample("größer", "the cat", (data.getvalue(),), data.getvalue())]
    pipe = load(ModelSpec(str(tiny_model), dtype="float32", device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    windows(monkeypatch)
    for keep in (0.5, 0.25):
        made = evaluate(maker(pipe), samples, grid([keep], ["random"]), find_metrics(["psnr"]), tmp_path)
    assert made["hardware"]["load"] is None and made["figures"]["all"]["random-0.25"]["samples"] == 1
    assert (tmp_path / "dense" / "größer.png").is_file()


def test_without_a_load_average_a_result_says_so(monkeypatch):
    assert result.make_result("x", {}, {})["hardware"]["load"] >= 0
    with monkeypatch.context() as patch:
        patch.delattr(os, "getloadavg")
        assert result.make_result("x", {}, {})["hardware"]["load"] is None

    def fails():
        raise OSError("no such thing here")

    monkeypatch.setattr(os, "getloadavg", fails)
    assert result.make_result("x", {}, {})["hardware"]["load"] is None


def test_without_proc_the_processor_and_the_peak_are_told_as_far_as_they_can(monkeypatch):
    read = Path.read_text

    def elsewhere(path, *given, **named):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return read(path, *given, **named)

    monkeypatch.setattr(Path, "read_text", elsewhere)
    monkeypatch.setattr("sparse_context.pipelines.memory._RESET", Path("/nowhere/clear_refs"))
    assert isinstance(result.make_result("x", {}, {})["hardware"]["cpu"], str)
    assert Peak(torch.device("cpu")).read() is None


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_processes_are_refused_where_they_cannot_be_forked(system, monkeypatch):
    """macOS can, and then crashes in its own libraries."""
    if system == "win32":
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    else:
        monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(ValueError, match="The number of processes is 2, which this system cannot fork: pass 0"):
        Ahead(lambda number: number, workers=2)
    assert Ahead(lambda number: number)(3) == 3


def test_a_lock_that_cannot_be_removed_while_it_is_held_is_removed_afterwards(tmp_path, monkeypatch):
    windows(monkeypatch)
    with alone(tmp_path / "run"), pytest.raises(ValueError, match="Another run is writing"):
        with alone(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_open_for_a_moment_is_replaced_after_it(tmp_path, monkeypatch):
    replace, refusals = os.replace, [True, True]

    def busy(source, target):
        if refusals and refusals.pop():
            raise PermissionError(errno.EACCES, "Access is denied", str(target))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    save_picture(picture(8, 8), tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").size == (8, 8)
    refusals += [True] * 99
    for save in (lambda: save_text("x", tmp_path / "a.png"), lambda: save_picture(picture(9, 9), tmp_path / "a.png")):
        with pytest.raises(
            ValueError, match=r"a.png' could not be written \(Access is denied\); close what has it open"
        ):
            save()
    (tmp_path / "new").touch()
    with pytest.raises(PermissionError):
        put_in_place(tmp_path / "new", tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").size == (8, 8) and len(list(tmp_path.iterdir())) == 2


def test_file_systems_without_modes_are_written_all_the_same(tmp_path, monkeypatch):
    def fails(*given, **named):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", fails)
    for _ in range(2):
        save_text("x", tmp_path / "a")
    config = TrainConfig(**SMALL | {"max_train_steps": 1})
    assert load_file(finetune(klein(), batches, Run(tmp_path / "run", "tiny", "x"), config))


def test_a_program_without_a_standard_error_reads_tiffs(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.tiff")

    def fails(descriptor):
        raise OSError(errno.EBADF, "Bad file descriptor")

    for stream in (None, sys.stderr):
        monkeypatch.setattr(sys, "stderr", stream)
        with monkeypatch.context() as patch:
            patch.setattr(os, "dup", fails)
            assert open_picture(tmp_path / "a.tiff").getpixel((0, 0)) == (255, 0, 0)


def test_no_run_ends_by_a_picture_that_is_open_in_a_viewer(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    host = klein()
    host.pipe.register_to_config(_name_or_path=str(tmp_path))
    (tmp_path / "call.json").write_text(json.dumps({"num_inference_steps": 1, **host.settings}))
    config = TrainConfig(validation_steps=1, **SMALL | {"max_train_steps": 2})
    with pytest.MonkeyPatch.context() as patch:

        def viewed(picture, path):
            (tmp_path / "run" / "validation").rmdir()
            (tmp_path / "run" / "validation").touch()  # also in the way of the next one
            raise ValueError(f"{path} could not be written; close what has it open")

        patch.setattr("sparse_context.training.finetune.save_picture", viewed)
        made = finetune(host, batches, Run(tmp_path / "run", "tiny", "x"), config, watch=Watch(validation=[example()]))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("No validation pictures at step")]
    assert made == tmp_path / "run" / LORA_FILE and len(said) == 2


# Text -----------------------------------------------------------------------------------------------------------------


def texts(tree):
    """The calls that open text: what is missing is their encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        if name in ("read_text", "write_text"):
            yield node
        place = 0 if owner else 1  # of the mode
        modes = [ast.unparse(mode) for mode in node.args[place : place + 1]]
        modes += [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "mode"]
        if name == "open" and owner not in ("Image", "os", "tarfile") and not any("b" in mode for mode in modes):
            yield node
        if name in ("run", "Popen", "check_output") and any(
            k.arg in ("text", "universal_newlines") for k in node.keywords
        ):
            yield node


FILES = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("runs/*.py"), *PACKAGE.parent.glob("examples/*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_every_text_has_its_encoding(file):
    """Else it is that of the system: cp1252 on Windows."""
    found = [f"line {node.lineno}: {ast.unparse(node)}" for node in texts(ast.parse(file.read_text(encoding="utf-8")))]
    assert not [line for line in found if "file.open(QIODevice" not in line]


def test_settings_with_umlauts_are_read_where_text_is_cp1252(tmp_path, monkeypatch):
    save_text(json.dumps({"negative_prompt": "größer Ł"}, ensure_ascii=False), tmp_path / "call.json")
    windows(monkeypatch)
    assert read_call_settings(tmp_path) == {"negative_prompt": "größer Ł"}


ELSEWHERE = {
    "os": {
        "O_DIRECTORY",
        "chown",
        "fork",
        "geteuid",
        "getloadavg",
        "getuid",
        "kill",
        "link",
        "mkfifo",
        "nice",
        "rename",
        "replace",
        "sched_getaffinity",
        "sched_setaffinity",
        "setpriority",
        "statvfs",
        "symlink",
        "sync",
    },
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "pause"},
}
GUARDED = {("result.py", "os.getloadavg"), ("images.py", "os.replace"), ("runner.py", "os.sched_getaffinity")}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_asked_of_a_system_that_another_has_not(file):
    """What moves a file or folder goes by `images.put_in_place`, which knows Windows."""
    tree, used = ast.parse(file.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in ELSEWHERE.get(node.value.id, ()):
                used.add((file.name, f"{node.value.id}.{node.attr}"))
        if isinstance(node, ast.Import):
            used |= {
                (file.name, one.name)
                for one in node.names
                if one.name in ("fcntl", "resource", "pwd", "grp", "termios")
            }
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
            if node.func.attr in ("rename", "symlink_to", "hardlink_to") or (
                node.func.attr == "replace" and not node.keywords
            ):
                used.add((file.name, ast.unparse(node)))
    assert used <= GUARDED
