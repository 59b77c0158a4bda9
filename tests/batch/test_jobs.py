"""Jobs: what a line may say, and what is wrong with one."""

import json

import numpy as np
import pytest
from PIL import Image

from batch.shared import ROWS, jobs_of
from sparse_context.batch.jobs import BadLine, Job
from sparse_context.pipelines.settings_file import parse_settings
from sparse_context.samples import ManifestError
from sparse_context.selectors.registry import user_mask


def one(folder, row, **base):
    (job,) = jobs_of(folder, [row], parse_settings(base))
    return job


def problem(folder, row):
    """What is wrong with a line beside a good one."""
    bad, good = jobs_of(folder, [row, {"prompt": "good"}])
    assert isinstance(good, Job) and isinstance(bad, BadLine) and bad.where == "line 1"
    (said,) = bad.problems
    return said


def test_a_job_has_its_own_settings_over_those_of_all(tmp_path):
    base = parse_settings({"model": "m", "keep": 0.3, "steps": 4, "seed": 9})
    jobs = jobs_of(tmp_path, ROWS, base)
    assert [job.name for job in jobs] == ["one", "000002", "000003", "000004"]
    assert [job.settings.request.config.keep for job in jobs] == [0.3, 0.5, 0.3, 0.3]
    assert [job.settings.request.seed for job in jobs] == [9, 1, 9, 9]
    assert [job.settings.request.steps for job in jobs] == [4] * 4 and jobs[0].settings.spec.model == "m"
    assert [job.read().prompt for job in jobs] == ["the cat", "the cat", "the dog", "a room"]
    assert [len(job.read().references) for job in jobs] == [2, 1, 2, 0]
    assert jobs[2].read().config.selector == {"edges": 1, "uniform": 1}


@pytest.mark.parametrize(
    ("task", "taken"),
    [("subject", "subject"), (["edit", "global"], ["edit", "global"]), ("recolour", "edit"), (None, "edit")],
)
def test_a_task_that_is_a_group_of_a_manifest_changes_nothing(tmp_path, task, taken):
    row = {"references": ["a.png", "b.png"], "prompt": "x", "task": task}
    assert one(tmp_path, row, task="edit").settings.request.config.task == taken


def test_keys_of_manifests_that_mean_nothing_here_are_taken_and_others_are_named(tmp_path):
    row = {"references": "a.png", "prompt": "x", "image": "truth.png", "mask": "m.png", "weather": "fine"}
    assert one(tmp_path, row).ignored == ("weather",)


def test_masks_of_references_are_for_the_selector_mask(tmp_path):
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(tmp_path / "m.png")
    row = {"references": ["a.png", "b.png"], "reference_masks": ["m.png", None], "prompt": "x"}
    assert one(tmp_path, row | {"selector": "edges"}).read().config.selector == "edges"
    assert one(tmp_path, row | {"selector": "edges"}).ignored == ("reference_masks (without the selector mask)",)
    for selector in ("mask", {"mask": 1, "edges": 1}):
        config = one(tmp_path, row | {"selector": selector}).read().config
        assert one(tmp_path, row | {"selector": selector}).ignored == ()
        assert user_mask(config.selector, 0).sum() == 64 * 255 and user_mask(config.selector, 1) is None
    config = one(tmp_path, row | {"selector": ["mask", "edges"]}).read().config
    assert user_mask(config.selector, 0).sum() == 64 * 255 and config.selector[1] == "edges"


def test_phrases_of_a_job_are_those_of_its_references(tmp_path):
    row = {"references": ["a.png", "b.png"], "prompt": "x", "phrases": ["the red car", None]}
    job = one(tmp_path, row, text_model="m")
    assert (
        job.settings.request.config.phrases == ["the red car", None] and job.settings.request.config.text_model == "m"
    )
    assert one(tmp_path, row | {"phrases": "a cat"}).settings.request.config.phrases == ["a cat", "a cat"]
    assert len({each.digest() for each in (job, one(tmp_path, row), one(tmp_path, row | {"phrases": None}))}) == 3
    assert problem(tmp_path, row | {"selector": "edges"}).startswith(
        "line 1: phrases is ['the red car', None], but sel"
    )


def test_a_mask_to_paint_in_is_opened_in_the_size_of_the_first_reference(tmp_path):
    Image.new("L", (64, 64), 255).save(tmp_path / "m.png")
    row = {"references": ["a.png"], "inpaint": "m.png", "prompt": "x"}
    assert one(tmp_path, row).read().inpaint.size == (64, 64)
    Image.new("L", (32, 64), 255).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="resize the mask to the picture"):
        one(tmp_path, row).read()


BAD = {
    "{": "line 1 is no JSON",
    "[1]": "line 1 is no JSON object",
    '{"prompt": "x", "prompt": "y"}': "line 1 has 'prompt' twice",
    '{"references": ["a.png"]}': "line 1 has no 'prompt'.",
    '{"prompt": 3}': "'prompt' is 3: write text.",
    '{"prompt": "x", "reference": ["a.png"]}': "line 1 has 'reference': write 'references'.",
    '{"prompt": "x", "step": 3}': "line 1 has 'step': write 'steps'.",
    '{"prompt": "x", "steps": "3"}': "line 1: steps is '3': pass a whole number or null.",
    '{"prompt": "x", "keep": 0}': "line 1: keep is 0: pass a ratio",
    '{"prompt": "x", "seed": -1}': "line 1: seed is -1: pass a number from 0",
    '{"prompt": "x", "lora": "a.safetensors"}': "line 1 has 'lora', which is one for all jobs: pass it to the command.",
    '{"prompt": "x", "inpaint": 3}': "line 1: 'inpaint' has 3 where the path of a picture belongs.",
    '{"prompt": "x", "references": [3]}': "line 1: 'references' has 3 where the path of a picture belongs.",
    '{"prompt": "x", "name": "a/b"}': "cannot be that of a file: leave out slashes",
    json.dumps({"prompt": "x", "name": "a" * 201}): "is too long for a file: write 200 bytes at most.",
}


@pytest.mark.parametrize(("line", "says"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_line_is_told_beside_good_ones(tmp_path, line, says):
    assert says in problem(tmp_path, line)


def test_what_a_job_would_lose_without_a_word_is_refused(tmp_path):
    assert problem(tmp_path, {"prompt": "x", "inpaint": "a.png"}) == (
        "line 1: inpaint says where to paint in the first reference, but there is none: name one."
    )
    said = "line 1 has 'text', which is the command's name for it: write 'phrases'."
    assert problem(tmp_path, {"prompt": "x", "references": "a.png", "text": "the red car"}) == said


def test_none_and_auto_are_written_as_in_the_command(tmp_path):
    row = {"prompt": "x", "references": ["a.png", "b.png"], "overview": ["none", 4], "selector": "auto"}
    config = one(tmp_path, row, selector="edges", overview=8).settings.request.config
    assert (config.overview, config.selector) == ([None, 4], None)


def test_two_jobs_of_one_name(tmp_path):
    first, second = jobs_of(tmp_path, [{"prompt": "x", "name": "Cat"}, {"prompt": "y", "name": "cat"}])
    assert isinstance(first, Job)
    assert second.problems == (
        "line 2 has the name 'cat', which is 'Cat' on Windows or macOS, of line 1: give each its own.",
    )


def test_a_file_without_a_job_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="jobs.jsonl holds no job: line 1 has no 'prompt'.$"):
        jobs_of(tmp_path, [{"references": ["a.png"]}, "{"])
    with pytest.raises(ManifestError, match="jobs.jsonl holds no job.$"):
        jobs_of(tmp_path, [""])
    (tmp_path / "jobs.jsonl").unlink()
    with pytest.raises(ManifestError, match="^The jobs '.*gone.jsonl' do not exist: pass a JSONL file"):
        from sparse_context.batch.jobs import read_jobs

        read_jobs(tmp_path / "gone.jsonl", parse_settings({}))


def test_jobs_are_told_apart_by_what_makes_another_picture(tmp_path):
    row = {"references": ["a.png"], "prompt": "x"}
    usual = one(tmp_path, row).digest()
    assert one(tmp_path, row | {"name": "other", "weather": "fine"}).digest() == usual
    assert one(tmp_path, row, device="cpu", cpu_offload="model").digest() == usual
    changed = [
        one(tmp_path, row | {"prompt": "y"}),
        one(tmp_path, row | {"seed": 1}),
        one(tmp_path, row | {"keep": 0.3}),
        one(tmp_path, row | {"references": ["a.png", "a.png"]}),
        one(tmp_path, row, lora="a"),
        one(tmp_path, row, model="m"),
        one(tmp_path, row, dtype="bfloat16"),
    ]
    assert len({usual, *(job.digest() for job in changed)}) == len(changed) + 1
