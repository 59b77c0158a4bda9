"""The training loop: schedule, averaging, checkpoints, and resuming to equal weights."""

import copy
import errno
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from elsewhere import open_files
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_context
from sparse_context.training import checkpoint_files, files
from sparse_context.training.card import LORA_FILE
from sparse_context.training.checkpoints import Checkpoints, has_begun, load_average, newest_step, start_from
from sparse_context.training.dropping import Dropping, draw_selection
from sparse_context.training.files import alone
from sparse_context.training.loop import LoopConfig, train
from sparse_context.training.muon import Muon
from sparse_context.training.optimisers import make_optimisers
from sparse_context.training.schedules import SCHEDULES, learning_rate


def problem():
    torch.manual_seed(0)
    module = nn.ModuleDict({"blocks": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    optimisers = make_optimisers(module, ["blocks"], lr=1e-2, muon_lr=1e-2)

    def loss(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (module["head"](module["blocks"](x).tanh()) - x[:, :2]).square().mean()

    return module, optimisers, loss


def run(folder, steps=12, stop_at=None, show=None, **changes):
    """The averaged and the last weights of a run; `stop_at` kills it after that step's checkpoint."""
    module, optimisers, loss = problem()

    def until_killed(step):
        if stop_at is not None and step >= stop_at:
            raise KeyboardInterrupt
        return loss(step)

    settings = {"steps": steps, "warmup": 2, "save_every": 3, "log_every": 3} | changes
    average = train(module, optimisers, until_killed, folder, LoopConfig(**settings), show=show)
    return average.state_dict(), module.state_dict()


def test_learning_rate_rises_holds_and_falls_to_zero():
    factors = [learning_rate(step, steps=100, warmup=10) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == 1.0
    assert set(factors[9:76]) == {1.0}
    assert factors[88] == pytest.approx(12 / 25) and factors[100] == 0.0


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    module, (adamw, muon), _ = problem()
    assert [p is module["blocks"].weight for g in muon.param_groups for p in g["params"]] == [True]
    assert sum(len(g["params"]) for g in adamw.param_groups) == 3


def test_where_all_is_matrices_of_blocks_there_is_muon_alone():
    (muon,) = make_optimisers(nn.ModuleDict({"blocks": nn.Linear(4, 4, bias=False)}), ["blocks"], lr=1e-2, muon_lr=1e-2)
    assert isinstance(muon, Muon)


@pytest.mark.parametrize(
    "settings", [{"adjust_lr_fn": "match_rms_adamw"}, {"nesterov": False, "weight_decay": 0.3}, {}]
)
def test_muon_of_all_matrices_at_once_is_torch_s_one_by_one(settings):
    """Wide, tall and square matrices, two of one shape, one without a gradient in the second step."""
    shapes = [(6, 4), (3, 8), (6, 4), (5, 5)]
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    ends = []
    for kind in (torch.optim.Muon, Muon):
        matrices = [nn.Parameter(matrix.clone()) for matrix in start]
        optimiser = kind(matrices, lr=0.1, **settings)
        for step in range(3):
            for i, matrix in enumerate(matrices):
                drawn = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(10 * step + i))
                matrix.grad = None if (step, i) == (1, 2) else drawn
            optimiser.step()
        state = optimiser.state_dict()
        ends.append(([matrix.detach() for matrix in matrices], state))
    moved = max((end - begin).abs().max() for end, begin in zip(ends[0][0], start, strict=True))
    assert moved > 0.05
    for theirs, ours in zip(ends[0][0], ends[1][0], strict=True):
        assert torch.allclose(theirs, ours, atol=0.03 * moved)  # orthogonalised in bfloat16
    optimiser.load_state_dict(ends[0][1])  # torch's state is taken, and is the same
    for i in range(len(shapes)):
        theirs, ours = (of["state"][i]["momentum_buffer"] for of in (optimiser.state_dict(), state))
        assert torch.allclose(theirs, ours, rtol=1e-6)


def test_a_step_whose_gradients_are_not_finite_changes_nothing(tmp_path):
    def trained(name, steps, broken=()):
        module, optimisers, loss = problem()
        train(
            module,
            optimisers,
            lambda step: loss(step) * (math.nan if step in broken else 1.0),
            tmp_path / name,
            LoopConfig(steps=steps, schedule="constant", ema=0.0),
        )
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    start = torch.cat([parameter.detach().flatten() for parameter in problem()[0].parameters()])
    assert torch.equal(trained("all", 3, broken=(0, 1, 2)), start)
    two = trained("two", 2)
    assert not torch.equal(two, start) and torch.equal(trained("last", 4, broken=(2, 3)), two)


def test_steps_without_finite_gradients_are_counted_and_end_a_run_that_learns_nothing_any_more(tmp_path):
    def broken(steps):
        return lambda step: loss(step) * (math.nan if step in steps else 1.0)

    module, optimisers, loss = problem()
    train(module, optimisers, broken({1, 2, 5}), tmp_path / "few", LoopConfig(steps=6, log_every=3))
    log = [json.loads(line) for line in (tmp_path / "few" / "log.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in log] == [2, 1]
    with pytest.raises(ValueError, match="^The gradients of steps 26 to 45 are not finite, .* lower learning rate"):
        train(
            module, optimisers, broken({*range(4, 24), *range(25, 99)} - {23}), tmp_path / "end", LoopConfig(steps=99)
        )


def test_a_killed_run_ends_at_equal_weights(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=8)  # after the checkpoint at 6
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=11)
    resumed = run(tmp_path / "killed")
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_checkpoints_are_kept_and_a_half_written_one_is_ignored(tmp_path):
    run(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-0000009", "step-0000012"]
    (tmp_path / "step-0000015.partial").mkdir()
    module, _, _ = problem()
    assert load_average(tmp_path, module) == 12


def test_the_start_of_a_run_is_written_over_what_a_kill_left(tmp_path):
    (tmp_path / "step-0000000.partial").mkdir()
    (tmp_path / "step-0000000.partial" / "weights.safetensors").write_text("half")
    assert not has_begun(tmp_path)
    start_from(nn.Linear(2, 2), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000"]
    assert has_begun(tmp_path) and newest_step(tmp_path) == 0


def test_checkpoints_go_by_their_number_and_copies_beside_them_are_left_alone(tmp_path):
    run(tmp_path)
    (tmp_path / "step-0000009").rename(tmp_path / "step-9999999")
    (tmp_path / "step-0000012").rename(tmp_path / "step-10000000")
    (tmp_path / "step-10000000 copy").mkdir()
    (tmp_path / "step-notes.txt").write_text("mine")
    assert newest_step(tmp_path) == 10_000_000
    run(tmp_path, steps=10_000_001, keep_last=1)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-10000000 copy", "step-10000001", "step-notes.txt"]


def contents(folder):
    """All that a run has written, by path: bytes, and of the log its records without their seconds."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    records = [json.loads(line) for line in found.pop("log.jsonl", b"").splitlines()]
    return found | {"log": [{name: value for name, value in one.items() if name != "seconds"} for one in records]}


# What else may have happened to a checkpoint ------------------------------------------------------------------------


def change(tensors):
    """A file whose tensors another function of them takes the place of."""

    def changed(path):
        save_file(tensors(load_file(path)), path)

    return changed


def zeroed(path):
    """What a disk or a copy may lose without a word."""
    data = path.read_bytes()
    assert any(data[-8:])
    path.write_bytes(data[:-8] + bytes(8))


def first(tensors, become):
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    return {**tensors, name: become(tensors[name])}


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "no file of the kind": lambda path: path.write_bytes(b"half"),
    "nothing": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no keys": change(lambda tensors: {}),
    "renamed": change(lambda tensors: {f"x{name}": tensor for name, tensor in tensors.items()}),
    "renamed ends": change(lambda tensors: {f"{name}x": tensor for name, tensor in tensors.items()}),
    "one key fewer": change(lambda tensors: dict(list(tensors.items())[1:])),
    "one key more": change(lambda tensors: {**tensors, "0.99.exp_avg": torch.zeros(2)}),
    "another type": change(lambda tensors: first(tensors, lambda tensor: tensor.bfloat16())),
    "another shape": change(lambda tensors: first(tensors, lambda tensor: tensor[:1])),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that ended, and one that was killed after its second checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    run(folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(folder / "killed", stop_at=8)
    return folder


def without_sums(checkpoint):
    """As checkpoints were before there were sums."""
    for name in ("SHA256SUMS", "progress.json"):
        (checkpoint / name).unlink(missing_ok=True)


@pytest.mark.parametrize("file", ["weights", "average", "optimiser"])
@pytest.mark.parametrize("damage", [*DAMAGE, "zeroed"])
@pytest.mark.parametrize("old", [False, True], ids=["with sums", "without"])
def test_a_checkpoint_that_is_not_what_was_written_is_one_sentence(file, damage, old, killed, tmp_path):
    if old and damage == "zeroed":
        pytest.skip("nothing tells, without sums")
    folder = shutil.copytree(killed / "killed", tmp_path / "killed")
    newest = folder / "step-0000006"
    (DAMAGE | {"zeroed": zeroed})[damage](newest / f"{file}.safetensors")
    if old:
        without_sums(newest)
    with pytest.raises(OSError, match=r"step-0000006 cannot be continued \(.*\): delete it") as raised:
        run(folder)
    assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)
    shutil.rmtree(newest)
    run(folder)
    assert contents(folder) == contents(killed / "whole")


@pytest.mark.parametrize("damage", ["zeroed", "cut", "gone", "another type", "renamed"])
def test_averaged_weights_are_proven_before_anything_is_made_of_them(damage, killed, tmp_path):
    folder = shutil.copytree(killed / "whole", tmp_path / "whole")
    (DAMAGE | {"zeroed": zeroed})[damage](folder / "step-0000012" / "average.safetensors")
    with pytest.raises(OSError, match="step-0000012 cannot be continued"):
        load_average(folder, problem()[0])


@pytest.mark.parametrize("name", ["SHA256SUMS", "progress.json"])
@pytest.mark.parametrize("data", [b"", b"half", b"\xff\xfe", b"[1]"])
def test_what_lies_beside_the_tensors_is_checked_too(name, data, killed, tmp_path):
    folder = shutil.copytree(killed / "killed", tmp_path / "killed")
    (folder / "step-0000006" / name).write_bytes(data)
    with pytest.raises(OSError, match=r"step-0000006 cannot be continued \(.*\): delete it"):
        run(folder)


def test_a_checkpoint_of_before_there_were_sums_goes_on_to_equal_weights(killed, tmp_path):
    folder = shutil.copytree(killed / "killed", tmp_path / "killed")
    for checkpoint in folder.glob("step-*"):
        without_sums(checkpoint)
    run(folder)
    assert contents(folder) == contents(killed / "whole")  # with sums again


def test_sums_are_such_as_sha256sum_reads(killed):
    checkpoint = killed / "whole" / "step-0000012"
    lines = (checkpoint / "SHA256SUMS").read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == [
        "average.safetensors",
        "optimiser.safetensors",
        "progress.json",
        "weights.safetensors",
    ]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=checkpoint, check=True)


def test_a_parameter_whose_whole_state_is_lost_is_noticed_at_its_first_gradient(killed, tmp_path):
    folder = shutil.copytree(killed / "killed", tmp_path / "killed")
    newest = folder / "step-0000006"
    without_sums(newest)
    change(lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("0.1.")})(
        newest / "optimiser.safetensors"
    )
    with pytest.raises(OSError, match=r"step-0000006 cannot be continued \(.* lacks the state of 1 of 3 parameters\)"):
        run(folder)


def test_without_a_gradient_there_is_no_state_to_miss(tmp_path):
    """A parameter that no step reaches has none, be it with sums or without."""
    for old in (False, True):
        folder = tmp_path / str(old)
        for steps in (3, 6):
            module = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
            train(
                module,
                [torch.optim.AdamW(module.parameters())],
                lambda step, used=module["used"]: used(torch.ones(2)).square().mean(),
                folder,
                LoopConfig(steps=steps, save_every=3),
            )
            if old:
                without_sums(folder / f"step-000000{steps}")
        assert newest_step(folder) == 6


def test_a_run_whose_first_steps_were_skipped_has_no_state_either(tmp_path):
    for steps in (3, 6):
        module, optimisers, loss = problem()
        train(
            module,
            optimisers,
            lambda step, loss=loss: loss(step) * (math.nan if step < 4 else 1.0),
            tmp_path,
            LoopConfig(steps=steps, save_every=3),
        )
    assert newest_step(tmp_path) == 6


def test_a_checkpoint_that_may_not_be_read_is_not_to_be_deleted(killed, tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_files, "load_file", refused)
    folder = shutil.copytree(killed / "killed", tmp_path / "killed")
    with pytest.raises(OSError, match=r"cannot be read \(Permission denied\): make its files readable\.$"):
        run(folder)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing tells what is mapped")
def test_a_resumed_run_holds_no_file_of_a_checkpoint(killed, tmp_path):
    """Windows neither removes nor replaces what is mapped, and the optimisers' states go on for the whole run."""
    folder = shutil.copytree(killed / "killed", tmp_path / "killed")
    module, optimisers, loss = problem()
    held = []

    def watched(step):
        held.extend(path for path in open_files() if path.startswith(os.path.realpath(folder) + os.sep))
        return loss(step)

    train(module, optimisers, watched, folder, LoopConfig(steps=12, warmup=2, save_every=3, log_every=3))
    assert held == []


# What is in the way, or full ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step-0000003", "step-0000012", "step-4"])
def test_a_file_with_the_name_of_a_checkpoint_is_told_before_a_step_is_taken(name, tmp_path):
    (tmp_path / name).write_text("mine")
    module, optimisers, _ = problem()
    with pytest.raises(OSError, match=f"{name} is no folder, and has the name of a checkpoint: move it away") as raised:
        train(module, optimisers, lambda step: pytest.fail("a step was taken"), tmp_path, LoopConfig(steps=12))
    assert "free some space" not in str(raised.value) and (tmp_path / name).read_text() == "mine"


def test_what_comes_into_the_way_during_a_run_ends_it_with_what_to_do_and_it_goes_on(killed, tmp_path):
    module, optimisers, loss = problem()
    log, file = tmp_path / "log.jsonl", tmp_path / "step-0000009"

    def disturbed(path, make):
        def until(step):
            if step == 8:
                make(path)
            return loss(step)

        return until

    settings = {"steps": 12, "warmup": 2, "save_every": 3, "log_every": 3}
    with pytest.raises(OSError, match="step-0000009 is no folder.*: move it away"):
        train(module, optimisers, disturbed(file, Path.touch), tmp_path, LoopConfig(**settings))
    file.unlink()

    def folder(path):
        path.unlink()
        path.mkdir()

    module, optimisers, loss = problem()
    with pytest.raises(
        OSError, match=r"log.jsonl could not be written \(Is a directory\): move what has its name away"
    ):
        train(module, optimisers, disturbed(log, folder), tmp_path, LoopConfig(**settings))
    log.rmdir()
    resumed, whole = run(tmp_path), run(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for one, other in zip(resumed, whole, strict=True) for name in one)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space and resume"),
        (errno.EDQUOT, "free some space and resume"),
        (errno.EACCES, "see that its folder is writable and that nothing has it open"),
        (errno.EROFS, "see that its folder is writable"),
        (errno.ENOTDIR, "move what has its name away"),
    ],
)
def test_what_cannot_be_written_is_told_by_its_cause(number, advice, tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=rf"step-0000003 could not be written \({os.strerror(number)}\): {advice}"):
        run(tmp_path)
    assert not list(tmp_path.glob("step-*"))


def test_a_checkpoint_that_cannot_be_removed_ends_no_run_and_goes_later(tmp_path, monkeypatch, capsys):
    replace, refused = os.replace, []

    def used(source, target):
        if Path(source).name == "step-0000003" and len(refused) < 5:  # as long as is tried at one checkpoint
            refused.append(source)
            raise PermissionError(errno.EACCES, "it is open", str(source))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", used)
    monkeypatch.setattr("sparse_context.images.time.sleep", lambda seconds: None)
    run(tmp_path)
    assert len(refused) == 5 and "step-0000003 could not be removed (it is open)" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-0000009", "step-0000012"]


def test_a_kill_before_the_pruning_leaves_no_checkpoint_too_many(tmp_path):
    run(tmp_path, keep_last=4)
    assert len(list(tmp_path.glob("step-*"))) == 4
    run(tmp_path)  # which has no step left
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-0000009", "step-0000012"]


def test_a_kill_before_the_pictures_of_a_checkpoint_loses_none(tmp_path):
    shown = []

    def show(step, average):
        shown.append(step)
        if shown == [6]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, show=show, show_every=6)
    run(tmp_path, show=show, show_every=6)
    assert shown == [6, 6, 12]


# The log of a killed run ----------------------------------------------------------------------------------------------


def broken_run(folder, kill_at=None, **changes):
    """A run with steps whose gradients are not finite, on either side of checkpoints and records."""
    module, optimisers, loss = problem()

    def until_killed(batch):
        if kill_at is not None and batch >= kill_at:
            raise KeyboardInterrupt
        return loss(batch) * (math.nan if batch // 2 in (1, 3, 4, 10) else 1.0)

    settings = {"steps": 12, "warmup": 2, "save_every": 3, "log_every": 5, "accumulate": 2} | changes
    train(module, optimisers, until_killed, folder, LoopConfig(**settings))


@pytest.mark.parametrize(
    "changes", [{}, {"log_every": 4, "save_every": 1}, {"log_every": 7, "save_every": 6, "ema": 0}]
)
def test_a_run_killed_in_any_batch_leaves_what_an_unbroken_one_does(changes, tmp_path):
    broken_run(tmp_path / "whole", **changes)
    whole = contents(tmp_path / "whole")
    every = changes.get("log_every", 5)
    assert [record["step"] for record in whole["log"]] == [*range(every, 12, every), 12]
    for kill_at in range(24):
        folder = tmp_path / str(kill_at)
        with pytest.raises(KeyboardInterrupt):
            broken_run(folder, kill_at, **changes)
        broken_run(folder, **changes)
        assert json.dumps(str(contents(folder))) == json.dumps(str(whole)), kill_at  # as text, where nan equals nan


def test_steps_in_a_row_are_counted_over_kills(tmp_path):
    """Else a run that is killed often enough would learn nothing for ever."""
    module, optimisers, loss = problem()
    taken = []

    def broken(kill_at):
        def until_killed(step):
            if step >= kill_at:
                raise KeyboardInterrupt
            taken.append(step)
            return loss(step) * math.nan

        return until_killed

    with pytest.raises(KeyboardInterrupt):
        train(module, optimisers, broken(17), tmp_path, LoopConfig(steps=99, save_every=8, log_every=2))
    with pytest.raises(ValueError, match="^The gradients of steps 1 to 20 are not finite"):
        train(module, optimisers, broken(99), tmp_path, LoopConfig(steps=99, save_every=8, log_every=2))
    assert taken == [*range(17), *range(16, 20)]


def test_a_log_has_the_same_line_ends_everywhere(tmp_path):
    run(tmp_path)
    data = (tmp_path / "log.jsonl").read_bytes()
    assert data.count(b"\n") == 4 and b"\r" not in data


def test_a_damaged_checkpoint_is_one_sentence_and_without_it_the_run_continues(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=8)
    newest = tmp_path / "cut" / "step-0000006"
    for damage in (b"half", None):
        if damage is None:
            (newest / "weights.safetensors").unlink()
        else:
            (newest / "weights.safetensors").write_bytes(damage)
        with pytest.raises(OSError, match=r"step-0000006 cannot be continued \(.*\): delete it") as raised:
            run(tmp_path / "cut")
        assert "\n" not in str(raised.value)
    shutil.rmtree(newest)
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[1][name], resumed[1][name]) for name in whole[1])


def test_it_stops_in_time_and_has_saved(tmp_path):
    run(tmp_path, stop_after=0.0)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-0000001"]


def test_the_log_has_a_record_every_so_often(tmp_path):
    run(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [3, 6, 9, 12]
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_log_keeps_its_records_alone(tmp_path):
    for name in (".a.part", "validation/.b.part", "step-0000004.partial/half"):  # what a kill leaves
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "log.jsonl").write_text('5\n{}\n{"step": 1}\n{"step": 4}\n[]\nhi\n{"step": 2')
    Checkpoints(tmp_path).tidy(3)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
    assert {path.name for path in tmp_path.rglob("*")} == {"log.jsonl", "validation"}


def test_a_folder_is_held_by_one_run(tmp_path):
    folder = tmp_path / "run"
    with alone(folder), pytest.raises(ValueError, match=f"^Another run is writing into {re.escape(str(folder))}: wait"):
        with alone(folder):
            pass
    assert not folder.exists()  # nothing was written
    with alone(folder):
        (folder / "config.json").touch()
    with alone(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    with alone(tmp_path / "above" / "below"):
        pass
    assert not (tmp_path / "above").exists()


@pytest.mark.parametrize("error", [NotImplementedError("no locks here"), OSError(errno.EROFS, "Read-only file system")])
def test_a_folder_that_cannot_be_locked_is_one_sentence(error, tmp_path, monkeypatch):
    def fails(self, timeout):
        raise error

    monkeypatch.setattr(files.FileLock, "acquire", fails)
    with pytest.raises(OSError, match=r"run cannot be written \(.*\): name another folder\.$"), alone(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_average(tmp_path, problem()[0])


# Schedules, accumulation, the format ------------------------------------------------------------------------------


def test_schedules():
    for name, schedule in SCHEDULES.items():
        factors = [schedule(step, 100, 10) for step in range(100)]
        assert all(0 <= factor <= 1 for factor in factors), name
        if name != "constant":
            assert factors[0] == 0.1 and factors[9] == 1.0
        assert schedule(0, 100, 0) == 1.0
    assert SCHEDULES["linear"](55, 100, 10) == pytest.approx(0.5) == SCHEDULES["cosine"](55, 100, 10)
    assert SCHEDULES["constant"](0, 100, 10) == SCHEDULES["constant_with_warmup"](99, 100, 10) == 1.0


def test_by_the_clock_the_last_step_comes_when_the_time_is_up(tmp_path, monkeypatch):
    module, optimisers, loss = problem()
    now, rates = [0.0], []
    monkeypatch.setattr("sparse_context.training.pace.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(step):
        rates.append(optimisers[0].param_groups[0]["lr"])
        now[0] += 1.0
        return loss(step)

    whole = optimisers[0].param_groups[0]["lr"]
    shown = []
    train(
        module,
        optimisers,
        slow,
        tmp_path,
        LoopConfig(steps=10**6, warmup=2, seconds=10.0, show_every=8),
        show=lambda step, average: shown.append(step),
    )
    assert shown == [8, 11]
    flat_then_down = [0.5, 1, 1, 1, 1, 1, 1, 1, 0.8, 0.4, 0.0]  # the last quarter of ten seconds
    assert [rate / whole for rate in rates] == pytest.approx(flat_then_down)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-0000011"]


def test_a_clock_without_time_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seconds is 0"):
        run(tmp_path, seconds=0)


def test_accumulated_batches_equal_one_of_their_size(tmp_path):
    def final(folder, size, accumulate):
        module, _, _ = problem()
        optimisers = [torch.optim.AdamW(module.parameters(), lr=1e-2)]
        data = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))

        def loss(batch):
            x = data[batch * size : (batch + 1) * size]
            return (module["head"](module["blocks"](x).tanh()) - x[:, :2]).square().mean()

        train(module, optimisers, loss, folder, LoopConfig(steps=3, warmup=1, save_every=3, accumulate=accumulate))
        return module.state_dict()

    whole, parts = final(tmp_path / "whole", 8, 1), final(tmp_path / "parts", 2, 4)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_no_average_returns_the_module_itself(tmp_path):
    average, last = run(tmp_path, ema=0.0)
    assert all(torch.equal(average[name], last[name]) for name in average)
    weights = [load_file(tmp_path / "step-0000012" / f"{name}.safetensors") for name in ("weights", "average")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in last)


def test_checkpoints_of_the_first_format_resume(tmp_path):
    """Written here as the first version of the loop wrote them; the run then ends where an unbroken one does."""
    whole = run(tmp_path / "whole")
    module, optimisers, loss = problem()
    average = copy.deepcopy(module)
    base = [group["lr"] for o in optimisers for group in o.param_groups]
    for step in range(6):
        factor = min(1.0, (step + 1) / 2, (12 - step) / 3)
        for group, rate in zip((g for o in optimisers for g in o.param_groups), base, strict=True):
            group["lr"] = rate * factor
        loss(step).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for kept, new in zip(average.parameters(), module.parameters(), strict=True):
                kept.lerp_(new, 1 - min(0.999, (step + 1) / (step + 10)))
    folder = tmp_path / "first" / "step-0000006"
    folder.mkdir(parents=True)
    save_file(module.state_dict(), folder / "weights.safetensors")
    save_file(average.state_dict(), folder / "average.safetensors")
    state = {
        f"{i}.{index}.{name}": tensor
        for i, optimiser in enumerate(optimisers)
        for index, entry in optimiser.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    save_file(state, folder / "optimiser.safetensors")
    resumed = run(tmp_path / "first")
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_log_of_a_killed_run_has_each_step_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=8, log_every=1)
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"step": 9, "lo')  # where a kill cut a line
    run(tmp_path, log_every=1)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 13))


# Kills, full disks, several processes -------------------------------------------------------------------------------

RUN = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from sparse_context.training.loop import LoopConfig, train

folder, width = Path(sys.argv[1]), int(sys.argv[2])
limit, _, first = sys.argv[3].partition("@")  # bytes that a file may have, and from which step on
accelerator, rank, ratios, seconds = None, 0, [], None
if len(sys.argv) > 4:
    from accelerate import Accelerator
    from sparse_context.training.dropping import Dropping, draw_selection
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
if len(sys.argv) > 5:
    import time, types
    from sparse_context.training import pace
    seconds = float(sys.argv[5])
    pace.time = types.SimpleNamespace(monotonic=lambda: (1 + 2 * rank) * time.monotonic())  # one clock runs fast
torch.manual_seed(rank)  # each process begins elsewhere, and takes the first one's weights
module = nn.Linear(width, width)

def loss(step):
    if limit != "0" and step == int(first or 0):
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(1000 * step + rank))
    if accelerator is not None:
        selection = draw_selection(Dropping(mix={"random": 1}, dense=0), [None], [(1, width)], [0, step, rank])
        ratios.append(selection.kept)
        x = x[:, selection.index] @ module.weight[selection.index] if step % 2 else x @ module.weight
        return x.square().mean()
    return (module(x) - x.flip(1)).square().mean()

config = LoopConfig(steps=10**6 if seconds else 40, warmup=2, save_every=10**6 if seconds else 2, log_every=3,
                    seconds=seconds)
average = train(module, [torch.optim.AdamW(module.parameters(), lr=1e-2)], loss, folder, config,
                accelerator=accelerator)
if accelerator is not None:
    torch.manual_seed(0)
    record = {"ratios": ratios, "sum": module.weight.double().sum().item(),
              "average": average.weight.double().sum().item()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(record))
    accelerator.end_training()  # as launch.py does: gloo's threads may abort a process that leaves them running
"""


def environment(**more):
    """Of a process that finds these modules, and the package where this process has found it."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(sparse_context.__file__).parents[1])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def start(tmp_path, folder, width=8, limit=0, *more, script=RUN, env=None):
    file = tmp_path / "run.py"
    file.write_text(script)
    command = [sys.executable, str(file), str(folder), str(width), str(limit), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**(env or {}))
    )


KILLS = """
# One process imports, and forks a run again and again: a start then takes no time, and a kill can come at any moment.
import importlib, json, os, runpy, shutil, signal, sys, time
from pathlib import Path
import numpy as np
from safetensors.torch import load_file
import torch

script, root, wanted = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
for name in sys.argv[4:]:
    importlib.import_module(name)
warm = torch.nn.Linear(2, 2)
warm(torch.ones(1, 2)).sum().backward()
torch.optim.AdamW(warm.parameters()).step()  # imports a lot, the first time

rng = np.random.default_rng()

def start(folder):
    child = os.fork()
    if child == 0:
        sys.argv = [script, str(folder), "128", "0"]
        runpy.run_path(script, run_name="__main__")
        os._exit(0)
    return child

def ended(child):
    process, status = os.waitpid(child, os.WNOHANG)
    assert not process or status == 0  # no state that a kill leaves may end a run
    return process == child

whole, folder, kills, moments, lost = root / "whole", root / "killed", 0, [], 0
began = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
took = time.monotonic() - began
def written():
    found = [p for p in folder.glob("*") if kills % 3 == 1 or p.suffix != ".partial"]
    return {(p.name, p.stat().st_size if p.name == "log.jsonl" else 0) for p in found}

while kills < wanted:
    child, done = start(folder), False
    for _ in range(rng.integers(1, 13) if kills % 3 else 0):  # not any moment, but as a write begins or ends
        before = written()
        while not (done := done or ended(child)) and written() == before:
            time.sleep(0.0005)
    time.sleep(float(rng.uniform(0, 0.01 if kills % 3 else took)))
    if not done and not (done := ended(child)):
        os.kill(child, signal.SIGKILL)  # which a run that has just ended no longer feels
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        done = status == 0
    if done:  # it was faster than the kill: begin again
        shutil.rmtree(folder)
        continue
    kept = 0
    for path in folder.glob("step-*"):
        if path.suffix != ".partial":
            assert all(load_file(path / f"{name}.safetensors") for name in ("weights", "average", "optimiser"))
            moments.append(int(path.name.removeprefix("step-")))
            kept = max(kept, moments[-1])
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    taken = [json.loads(line)["step"] for line in lines if line.endswith("}")]  # a kill may have cut the last one
    lost += max([kept, *taken]) - kept
    enough = lost and len(set(moments)) > 1  # or else another kill takes the place of the last one
    kills = min(kills + 1, wanted if enough else wanted - 1)
assert os.waitpid(start(folder), 0)[1] == 0
print(kills, len(set(moments)), lost)
"""


def kill(tmp_path, script, kills, *modules):
    """Run `script` to its end in `whole`, and in `killed` with so many kills -9 on the way, which cost it steps."""
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, "-c", KILLS, str(tmp_path / "run.py"), str(tmp_path), str(kills), *modules]
    done = subprocess.run(command, text=True, capture_output=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    killed, moments, lost = map(int, done.stdout.split()[-3:])
    assert killed == kills and moments > 1 and lost > 0


@pytest.mark.slow
@pytest.mark.xdist_group(name="processes")  # one after the other: some go by the clock
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_it_ends_at_equal_weights(tmp_path):
    """kill -9, twenty times; what is there is whole each time, and the end is that of an unbroken run."""
    kill(tmp_path, RUN, 20, "sparse_context.training.loop")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


FINETUNE = """
import json, sys
from pathlib import Path
from tiny import build_flux2, picture
from diffusers import Flux2KleinPipeline
from sparse_context.families import find_host
from sparse_context.training import loss
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Example
from sparse_context.training.dropping import Dropping
from sparse_context.training.finetune import Run, Watch, finetune

folder, accelerator, ratios = Path(sys.argv[1]), None, []
if len(sys.argv) > 4:
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    keep = loss.draw_selection
    loss.draw_selection = lambda *given: ratios.append((selection := keep(*given)).kept) or selection
settings = {"max_sequence_length": 12, "text_encoder_out_layers": [1, 2]}
host = find_host(build_flux2(Flux2KleinPipeline, is_distilled=True), settings)

def batches(number):
    return [Example("the cat", (picture(64, 64, number),), picture(64, 64, number + 1), (None,), aligned=True)]

config = TrainConfig(rank=2, lora_alpha=2, max_train_steps=10, checkpointing_steps=3, learning_rate=1e-2,
                     subsets=2, gradient_accumulation_steps=2, ema=0.9, caption_dropout=0.3,
                     dropping=Dropping(overview_factors=(2, 4)), teach=0.1, teach_heads=("1.0",))
run = Run(folder, "tiny", "x", resume=True)
finetune(host, batches, run, config, accelerator=accelerator, watch=Watch(log_every=4))
if accelerator is not None:
    trained = sum(p.double().sum().item() for p in host.transformer.parameters() if p.requires_grad)
    record = {"ratios": ratios[:10], "sum": trained}  # the thread that prepares is one ahead
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(record))
    accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.xdist_group(name="processes")  # one after the other: some go by the clock
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fine_tuning_killed_at_random_moments_writes_an_equal_lora(tmp_path):
    """The same of a whole fine-tuning of a pipeline, whose checkpoints are several steps apart, of several batches."""
    kill(tmp_path, FINETUNE, 12, "tiny", "accelerate", "peft", "sparse_context.training.finetune")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        LORA_FILE,
        "README.md",
        "config.json",
        "log.jsonl",
        "step-0000009",
        "step-0000010",
    }


@pytest.mark.slow
@pytest.mark.xdist_group(name="processes")  # one after the other: some go by the clock
@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_full_disk_leaves_checkpoints_whole_and_says_so(tmp_path):
    """A limit on the size of files stands for a disk that is full in the midst of the third file."""
    process = start(tmp_path, tmp_path / "full", 64, 20_000)  # the optimiser's file is the largest
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("OSError: ") and "step-0000002 could not be written" in last and "free some space" in last
    assert not list((tmp_path / "full").glob("step-*"))


@pytest.mark.slow
@pytest.mark.xdist_group(name="processes")  # one after the other: some go by the clock
@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_disk_that_fills_up_keeps_the_older_checkpoint_and_the_run_goes_on_from_it(tmp_path):
    """The limit comes in the midst of the run; once there is space again, it ends where an unbroken one does."""
    process = start(tmp_path, tmp_path / "full", 64, "20000@11")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("OSError: ") and "step-0000012 could not be written" in last
    assert sorted(p.name for p in (tmp_path / "full").glob("step-*")) == ["step-0000008", "step-0000010"]
    for folder in ("full", "whole"):
        _, errors = (process := start(tmp_path, tmp_path / folder, 64)).communicate(timeout=120)
        assert process.returncode == 0, errors
    for name in ("weights", "average", "optimiser"):
        one, other = (load_file(tmp_path / w / "step-0000040" / f"{name}.safetensors") for w in ("whole", "full"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def two_processes(tmp_path, *more, script=RUN):
    """What each of two processes recorded, that share the folder `run`."""
    for process in start_two(tmp_path, [tmp_path / "run"] * 2, *more, script=script):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [json.loads((tmp_path / "run" / f"rank-{r}.json").read_text()) for r in (0, 1)]


def two_ranks():
    """What is in the environments of two processes over gloo that `accelerate launch` starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]


def start_two(tmp_path, folders, *more, script=RUN):
    """Real processes, each with its folder."""
    return [
        start(tmp_path, folder, 16, 0, "several", *more, script=script, env=env)
        for folder, env in zip(folders, two_ranks(), strict=True)
    ]


@pytest.mark.slow
@pytest.mark.xdist_group(name="processes")  # one after the other: some go by the clock
def test_two_processes_by_the_clock_have_one_clock(tmp_path):
    """Where each went by its own, they would take steps of different sizes, and stop at different ones."""
    first, second = two_processes(tmp_path, "1.5")
    assert first["sum"] == second["sum"] and first["average"] == second["average"]
    assert len(first["ratios"]) == len(second["ratios"]) > 1


@pytest.mark.slow
@pytest.mark.xdist_group(name="processes")  # one after the other: some go by the clock
def test_two_processes_draw_their_own_ratios_and_end_at_equal_weights(tmp_path):
    records = two_processes(tmp_path)
    assert records[0]["sum"] == records[1]["sum"] and records[0]["average"] == records[1]["average"]
    assert len(records[0]["ratios"]) == 40
    assert sum(a != b for a, b in zip(records[0]["ratios"], records[1]["ratios"], strict=True)) > 30
    # The mean of both gradients, computed here in one process
    weights = load_file(tmp_path / "run" / "step-0000040" / "weights.safetensors")
    assert torch.equal(weights["weight"], expected_of_two(tmp_path)["weight"])


@pytest.mark.slow
@pytest.mark.xdist_group(name="processes")  # one after the other: some go by the clock
def test_two_processes_fine_tune_one_lora_with_ratios_of_their_own(tmp_path):
    records = two_processes(tmp_path, script=FINETUNE)
    assert records[0]["sum"] == records[1]["sum"] != 0
    assert sum(a != b for a, b in zip(records[0]["ratios"], records[1]["ratios"], strict=True)) > 7
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["processes"] == 2 and newest_step(tmp_path / "run") == 10
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / LORA_FILE).values())


@pytest.mark.slow
@pytest.mark.xdist_group(name="processes")  # one after the other: some go by the clock
def test_two_processes_go_on_from_a_checkpoint_to_equal_weights_and_only_from_one(tmp_path):
    two_processes(tmp_path, script=FINETUNE)
    run = tmp_path / "run"
    whole, log = load_file(run / LORA_FILE), contents(run)["log"]
    for left in (run / "step-0000010", run / LORA_FILE):  # as if both had been killed in the last step
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.copytree(run, tmp_path / "other")
    two_processes(tmp_path, script=FINETUNE)
    resumed = load_file(run / LORA_FILE)
    assert contents(run)["log"] == log and len(log) == 3
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)

    (run / LORA_FILE).unlink()
    for process in start_two(tmp_path, [run, tmp_path / "other"], script=FINETUNE):  # at steps 10 and 9
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and "The processes found checkpoints of different steps (10, 9)" in errors


def expected_of_two(tmp_path):
    torch.manual_seed(0)
    module = nn.Linear(16, 16)

    def part(step, rank):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1000 * step + rank))
        selection = draw_selection(Dropping(mix={"random": 1}, dense=0), [None], [(1, 16)], [0, step, rank])
        kept = x[:, selection.index] @ module.weight[selection.index] if step % 2 else x @ module.weight
        return kept.square().mean()

    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    train(
        module,
        [optimiser],
        lambda b: part(b // 2, b % 2),
        tmp_path / "one",
        LoopConfig(steps=40, warmup=2, accumulate=2),
    )
    return module.state_dict()
