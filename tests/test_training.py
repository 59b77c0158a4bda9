"""The training loop: schedule, averaging, checkpoints, and resuming to equal weights."""

import json

import pytest
import torch
from torch import nn

from sparse_context.training.loop import learning_rate, load_average, make_optimisers, train


def problem():
    torch.manual_seed(0)
    module = nn.ModuleDict({"blocks": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    optimisers = make_optimisers(module, ["blocks"], lr=1e-2, muon_lr=1e-2)

    def loss(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (module["head"](module["blocks"](x).tanh()) - x[:, :2]).square().mean()

    return module, optimisers, loss


def run(folder, steps=12, stop_at=None, **changes):
    """The averaged and the last weights of a run; `stop_at` kills it after that step's checkpoint."""
    module, optimisers, loss = problem()

    def until_killed(step):
        if stop_at is not None and step >= stop_at:
            raise KeyboardInterrupt
        return loss(step)

    settings = {"steps": steps, "warmup": 2, "save_every": 3, "log_every": 3} | changes
    average = train(module, optimisers, until_killed, folder, **settings)
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


def test_it_stops_in_time_and_has_saved(tmp_path):
    run(tmp_path, stop_after=0.0)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-0000001"]


def test_the_log_has_a_record_every_so_often(tmp_path):
    run(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [3, 6, 9, 12]
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_average(tmp_path, problem()[0])
