"""The curves of training runs: what is read of their folders, also while they go on, and what is drawn of it."""

import json
import sys

import numpy as np
import pytest
import training_curves
from training_curves import course_table, read_run, smoothed

from sparse_context.images import open_picture

GATES = [
    {"step": 10, "psnr": {"base": {"edits": 22.25, "subjects": 30.0}, "student": {"edits": 10.0}}},
    {"step": 20, "psnr": {"student": {"edits": 11.0}}},
    {"step": 20, "psnr": {"student": {"edits": 12.0}}},
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    log = [json.dumps({"step": 10 * (i + 1), "loss": 1 / (i + 1)}) for i in range(30)]
    (folder / "log.jsonl").write_text("\n".join(log) + '\n{"step": 310, "lo')
    (folder / "gates.jsonl").write_text("".join(json.dumps(record) + "\n" for record in GATES))
    return folder


def test_half_a_line_is_left_for_later_and_a_gate_counts_as_it_was_last(run):
    course = read_run(run)
    assert len(course.log) == 30 and course.log[-1] == {"step": 300, "loss": 1 / 30}
    assert course.gates == {
        "edits": {"base": [(10, 22.25)], "student": [(10, 10.0), (20, 12.0)]},
        "subjects": {"base": [(10, 30.0)]},
    }


def test_losses_are_averaged_with_those_before_them():
    assert smoothed([4.0, 2.0, 0.0, 1.0], over=2).tolist() == [4.0, 3.0, 1.0, 0.5]


def test_the_table_says_where_each_run_is(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text('{"step": 2000, "loss": 0.5}\n')
    loss = np.mean([1 / (i + 1) for i in range(20, 30)])
    assert course_table([read_run(run), read_run(tmp_path / "other")]) == (
        "| run | steps | loss, mean of 10 records |\n| --- | --- | --- |\n"
        f"| mine | 300 | {loss:.4f} |\n| other | 2,000 | 0.5000 |\n\n"
        "| run | gate | edits, dB (step) | subjects, dB (step) |\n| --- | --- | --- | --- |\n"
        "| mine | base | 22.2 (10) | 30.0 (10) |\n| mine | student | 12.0 (20) |  |"
    )


def test_the_command_draws_a_panel_for_the_loss_and_each_group(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    sizes = []
    for gates in (True, False):
        if not gates:
            (run / "gates.jsonl").unlink()
        monkeypatch.setattr(sys, "argv", ["curves", str(run), "--output", str(tmp_path / "curves.webp")])
        training_curves.main()
        assert ("student" in capsys.readouterr().out) is gates
        sizes.append(open_picture(tmp_path / "curves.webp").width)
    assert abs(sizes[0] - 3 * sizes[1]) <= 2


def test_other_runs_do_not_replace_the_picture_of_the_documents(run, monkeypatch, capsys):
    before = training_curves.PICTURE.read_bytes()
    monkeypatch.setattr(sys, "argv", ["curves", str(run)])
    with pytest.raises(SystemExit):
        training_curves.main()
    assert "name an --output" in capsys.readouterr().err
    assert training_curves.PICTURE.read_bytes() == before


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no log.jsonl with a record: name the folder of a run"):
        read_run(tmp_path)
