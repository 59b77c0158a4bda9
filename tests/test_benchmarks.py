"""Benchmarks of subjects: folders in exactly their format, their metrics on known values, their tables and judges."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation_metrics import tiny_clip, tiny_dino  # noqa: F401
from tiny import picture

from sparse_context.cli import main
from sparse_context.evaluation.benchmarks import BENCHMARKS, find_benchmark, paper_tables
from sparse_context.evaluation.custom_concept import read_custom_concept
from sparse_context.evaluation.dreambench import KINDS, read_dreambench
from sparse_context.evaluation.judge import check_wording
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.evaluation.omnicontext import GROUPS, read_omnicontext


def draw(path, seed, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(*size, seed=seed).save(path)


# DreamBench++ ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dreambench(tmp_path_factory):
    """A picture of each category, with a subject and nine prompts."""
    folder = tmp_path_factory.mktemp("dreambench") / "data"
    for seed, place in enumerate(("live_subject/animal/00", "live_subject/human/07", "object/10", "style/03")):
        draw(folder / "images" / f"{place}.jpg", seed)
        captions = folder / "captions" / f"{place}.txt"
        captions.parent.mkdir(parents=True, exist_ok=True)
        captions.write_text("\n".join(["kitten", *(f"a cat, {i} " for i in range(9))]) + "\n")
    return folder


def test_dreambench_is_read_with_the_groups_of_its_paper(dreambench):
    samples = read_dreambench(str(dreambench))
    assert len(samples) == 4 * 9
    first, last = samples[0], samples[-1]
    assert (first.name, first.prompt) == ("live_subject_animal_00-0", "a cat, 0")
    assert (last.name, last.prompt) == ("style_03-8", "a cat, 8")
    assert first.references == (dreambench / "images/live_subject/animal/00.jpg",)
    assert [sample.groups for sample in samples[:9]] == [("animal", kind) for kind in KINDS]
    assert KINDS.count("photorealistic") == 4 and KINDS.count("style transfer") == 3 and KINDS.count("imaginative") == 2
    assert (first.task, last.task) == ("subject", "global")
    assert first.open_image() is None and first.source_caption == "kitten"


def test_another_folder_than_that_of_dreambench_is_refused(dreambench, tmp_path):
    with pytest.raises(ValueError, match="no DreamBench.. folder: it has no pictures below images/; get the benchmark"):
        read_dreambench(str(tmp_path))
    draw(tmp_path / "images" / "cars" / "00.jpg", 0)
    with pytest.raises(ValueError, match="00.jpg is in no folder of animal, human, object, style"):
        read_dreambench(str(tmp_path))
    (tmp_path / "images" / "cars").rename(tmp_path / "images" / "object")
    with pytest.raises(ValueError, match="00.jpg has no captions that can be read"):
        read_dreambench(str(tmp_path))
    (tmp_path / "captions" / "object").mkdir(parents=True)
    (tmp_path / "captions" / "object" / "00.txt").write_text("cat\na\nb\n")
    with pytest.raises(ValueError, match="00.txt has 2 prompts, and not the 9 of DreamBench"):
        read_dreambench(str(tmp_path))
    (tmp_path / "captions" / "object" / "00.txt").write_text("\n")
    with pytest.raises(ValueError, match="00.txt has 0 prompts, and not the 9 of DreamBench"):
        read_dreambench(str(tmp_path))


# CustomConcept101 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    """Two concepts and a pair of them, as they are in the benchmark's own files."""
    folder = tmp_path_factory.mktemp("customconcept101")
    entries = []
    for number, (name, kind, pictures) in enumerate((("pet_cat1", "cat", 3), ("decoritems_vase2", "vase", 2)), start=1):
        for i in range(pictures):
            draw(folder / "benchmark_dataset" / name / f"{i}.jpeg", 10 * number + i)
        entries.append(
            {
                "instance_prompt": f"photo of a <new{number}> {kind}",
                "class_prompt": kind,
                "instance_data_dir": f"./benchmark_dataset/{name}",
                "class_data_dir": f"./regularization/{name}",
                "prompt_filename": f"prompts/{kind}.txt",
            }
        )
    (folder / "prompts").mkdir()
    (folder / "prompts" / "cat.txt").write_text("photo of a {}.\n{} in snowy ice.")
    (folder / "prompts" / "vase.txt").write_text("a {} on a table.")
    (folder / "prompts" / "vase_pet.txt").write_text("the {0} in the {1}.\n")
    (folder / "dataset.json").write_text(json.dumps(entries))
    pair = [*entries, {"prompt_filename_compose": "prompts/vase_pet.txt"}]
    (folder / "dataset_multiconcept.json").write_text(json.dumps([pair]))
    return folder


def test_concepts_are_read_with_all_pictures_that_outputs_are_compared_with(concepts):
    samples = read_custom_concept(str(concepts))
    assert [(sample.name, sample.prompt) for sample in samples] == [
        ("pet_cat1-01", "photo of a cat."),
        ("pet_cat1-02", "cat in snowy ice."),
        ("decoritems_vase2-01", "a vase on a table."),
        ("pet_cat1+decoritems_vase2-01", "the cat in the vase."),
    ]
    assert [sample.groups for sample in samples] == [
        ("single concept", "pet"),
        ("single concept", "pet"),
        ("single concept", "decoritems"),
        ("multiple concepts",),
    ]
    both = samples[-1]
    assert [each.parent.name for each in both.references] == ["pet_cat1", "decoritems_vase2"]
    assert [[path.name for path in each] for each in both.targets] == [
        ["0.jpeg", "1.jpeg", "2.jpeg"],
        ["0.jpeg", "1.jpeg"],
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "no CustomConcept101 folder: dataset.json cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), "holds no entries"),
        (
            lambda folder: (folder / "dataset.json").write_text("[{}]"),
            "entry 1 is not as in CustomConcept101: it has no",
        ),
        (lambda folder: (folder / "dataset.json").write_text("[" * 100_000), "dataset.json cannot be read"),
        (
            lambda folder: (folder / "dataset.json").write_text(
                '[{"prompt_filename": "prompts/cat.txt", "class_prompt": 5, "instance_data_dir": "benchmark_dataset"}]'
            ),
            "entry 1 is not as in CustomConcept101: class_prompt is 5, which is no text",
        ),
        (lambda folder: (folder / "prompts/cat.txt").unlink(), "cat.txt cannot be read"),
        (lambda folder: (folder / "prompts/cat.txt").write_text("{1}"), "line 1 asks for concept '1', and there are 1"),
        (lambda folder: (folder / "dataset_multiconcept.json").write_text("[3]"), "entry 1 is no list of concepts"),
        (lambda folder: (folder / "benchmark_dataset").rename(folder / "other"), "pet_cat1 has no pictures: unpack"),
    ],
)
def test_what_is_wrong_with_concepts_is_named(change, said, concepts, tmp_path):
    import shutil

    folder = shutil.copytree(concepts, tmp_path / "copy")
    change(folder)
    with pytest.raises(ValueError) as error:
        read_custom_concept(str(folder))
    assert said in str(error.value)


# OmniContext ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def omnicontext(tmp_path_factory):
    """A parquet file with the columns of the data set, pictures inside."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("OmniContext")
    pictures = []
    for seed in range(3):
        file = io.BytesIO()
        picture(64, 64, seed=seed).save(file, "png")
        pictures.append({"bytes": file.getvalue(), "path": None})
    rows = {
        "key": ["aa", "aa", "cc"],
        "task_type": ["scene_object", "single_character", "single_character"],
        "instruction": ["a cat in the room", "a cat", "eine Katze"],
        "instruction_language": ["en", "en", "de"],
        "input_images": [pictures[:2], pictures[2:], pictures[2:]],
    }
    text = datasets.Value("string")
    features = dict.fromkeys(rows, text) | {"input_images": datasets.List(datasets.Image())}
    (folder / "data").mkdir()
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(folder / "data" / "train-00000.parquet")
    return folder


def test_omnicontext_is_read_in_english_and_in_the_order_of_its_table(omnicontext):
    first, second = read_omnicontext(str(omnicontext))
    assert (first.name, first.prompt, first.groups) == ("single_character-aa", "a cat", ("single_character",))
    assert (second.name, second.groups) == ("scene_object-aa", ("scene_object",))
    assert [np.asarray(each).tolist() for each in second.open_references()] == [
        np.asarray(picture(64, 64, seed=seed)).tolist() for seed in (0, 1)
    ]
    assert first.size == (1024, 1024) and first.task == "subject"


def test_another_data_set_than_omnicontext_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="get the data set OmniGen2/OmniContext"):
        read_omnicontext(str(tmp_path))
    rows = {"key": ["a"], "task_type": ["odd"], "instruction": ["x"], "input_images": [["a.png"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="row 1: task_type is 'odd', and none of single_character, "):
        read_omnicontext(str(tmp_path))


# Metrics --------------------------------------------------------------------------------------------------------------


def test_text_alignment_is_clip_score(tiny_clip):  # noqa: F811
    own = BENCHMARKS["customconcept101"].metrics
    score = find_metrics([f"text_alignment={tiny_clip}"], {**own})["text_alignment"].function
    cosine = find_metrics([f"clip_t={tiny_clip}"])["clip_t"].function
    values = [(score(picture(64, 64, seed), "a cat"), cosine(picture(64, 64, seed), "a cat")) for seed in range(4)]
    assert all(each == pytest.approx(max(0, 2.5 * other)) for each, other in values)


def test_dino_of_the_benchmarks_sees_the_middle_of_a_larger_picture(tiny_dino):  # noqa: F811
    """Its tiny model has 32 pixels a side, so a picture of 37 x 74 is cut as one of 256 x 512 is for 224."""
    from transformers import ViTModel

    own = BENCHMARKS["dreambench++"].metrics
    dino = find_metrics([f"dino_v1={tiny_dino}"], {**own})["dino_v1"].function
    first, second = picture(74, 37, seed=1), picture(37, 37, seed=2)
    net = ViTModel.from_pretrained(tiny_dino, add_pooling_layer=False).eval()
    tokens = []
    for each, left in ((first, 21), (second, 2)):
        x = torch.tensor(np.asarray(each.crop((left, 2, left + 32, 34)))).permute(2, 0, 1)[None] / 255
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        with torch.inference_mode():
            tokens.append(net(pixel_values=x).last_hidden_state[0, 0])
    assert dino(first, second) == pytest.approx(float(torch.cosine_similarity(*tokens, dim=0)), abs=1e-5)
    assert dino(first, first) == pytest.approx(1)


# The command ----------------------------------------------------------------------------------------------------------


def evaluate(monkeypatch, capsys, model, *options):
    usual = ["-m", model, "--dtype", "float32", "--device", "cpu", "--keep", "0.5", "--selector", "random"]
    monkeypatch.setattr(sys, "argv", ["sparse-context", "evaluate", *map(str, (*usual, *options))])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


def test_dreambench_from_the_folder_to_table_and_judge(
    dreambench,
    tiny_model,
    tiny_clip,  # noqa: F811
    tiny_dino,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    metrics = [f"--metric=clip_i={tiny_clip}", f"--metric=clip_t={tiny_clip}", f"--metric=dino_v1={tiny_dino}"]
    options = ["--benchmark", "DreamBench++", "--data", dreambench, "--output", tmp_path, *metrics, "--limit", "10"]
    code, out, err = evaluate(monkeypatch, capsys, tiny_model, *options)
    assert code == 0, err
    assert not (tmp_path / "judge.jsonl").exists() and str(tmp_path / "benchmark.md") in out
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert list(figures) == ["all", "animal", *dict.fromkeys(KINDS), "human"]
    assert [figures[group]["dense"]["samples"] for group in figures] == [10, 9, 5, 3, 2, 1]
    rows = json.loads((tmp_path / "cells" / "dense.json").read_text())["figures"]["samples"]
    clip_t = [row["scores"]["clip_t"] for row in rows if "imaginative" in row["groups"]]
    assert figures["imaginative"]["dense"]["scores"]["clip_t"]["mean"] == pytest.approx(np.mean(clip_t), abs=1e-6)

    tables = (tmp_path / "benchmark.md").read_text()
    heads = [line for line in tables.splitlines() if line.startswith("| setting")]
    assert heads == [
        "| setting | kept | clip_i | clip_t | dino_v1 |",
        "| setting | kept | animal | human | all |",
        "| setting | kept | photorealistic | style transfer | imaginative | all |",
        "| setting | kept | animal | human | all |",
    ]
    mean, sparse = (figures["human"][name]["scores"]["clip_i"] for name in ("dense", "random-0.5"))
    assert (
        f"| dense | 100.0 % | {figures['animal']['dense']['scores']['clip_i']['mean']:.3f} | {mean['mean']:.3f} |"
        in tables
    )
    assert f"{sparse['mean']:.3f} ({sparse['difference']:+.3f})" in tables

    # The judge needs every output, and those of the first samples alone were kept: the sparse ones are made again
    dense = (tmp_path / "dense" / "live_subject_animal_00-8.png").read_bytes()
    assert not (tmp_path / "shown" / "random-0.5" / "live_subject_animal_00-8.png").exists()
    code, out, err = evaluate(monkeypatch, capsys, tiny_model, *options, "--judge", "own")
    assert code == 0, err
    assert (tmp_path / "dense" / "live_subject_animal_00-8.png").read_bytes() == dense
    lines = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["id"] for line in lines}) == 10 * 2 * 2
    assert {line["question"] for line in lines} == {"concept preservation", "prompt following"}
    for line in lines:
        content = line["messages"][-1]["content"]
        paths = [part["path"] for part in content if part["type"] == "image"]
        assert len(paths) == (2 if line["question"] == "concept preservation" else 1)
        assert all((tmp_path / path).resolve().is_file() for path in paths)
        assert line["scale"] == [0, 4] and line["wording"] == "own"
    asked = next(line for line in lines if line["id"] == "random-0.5/live_subject_animal_00-8/prompt following")
    assert "a cat, 8" in asked["messages"][0]["content"][0]["text"]


def test_omnicontext_has_references_for_its_judge(omnicontext, tiny_model, tmp_path, monkeypatch, capsys):
    options = ["--benchmark", "omnicontext", "--data", omnicontext, "--output", tmp_path, "--judge", "own"]
    code, out, err = evaluate(monkeypatch, capsys, tiny_model, *options, "--metric", "psnr")
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines[:2]] == [
        "dense/single_character-aa/prompt following",
        "dense/single_character-aa/subject consistency",
    ]
    content = lines[-1]["messages"][0]["content"]
    assert [part.get("path") for part in content] == [
        None,
        "judge/scene_object-aa-1.png",
        "judge/scene_object-aa-2.png",
        "shown/random-0.5/scene_object-aa.png",
    ]
    assert np.array_equal(Image.open(tmp_path / "judge/scene_object-aa-2.png"), picture(64, 64, seed=1))
    assert "a cat in the room" in content[0]["text"] and "place" in content[0]["text"]


def test_outputs_are_compared_with_every_picture_of_every_concept(
    concepts,
    tiny_model,
    tiny_clip,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    options = ["--benchmark", "customconcept101", "--data", concepts, "--output", tmp_path]
    code, _, err = evaluate(monkeypatch, capsys, tiny_model, *options, f"--metric=image_alignment={tiny_clip}")
    assert code == 0, err
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert list(figures) == ["all", "single concept", "pet", "decoritems", "multiple concepts"]
    both = read_custom_concept(str(concepts))[-1]
    output = Image.open(tmp_path / "dense" / f"{both.name}.png")
    clip_i = find_metrics([f"clip_i={tiny_clip}"])["clip_i"].function
    expected = np.mean([np.mean([clip_i(output, Image.open(path)) for path in each]) for each in both.targets])
    assert figures["multiple concepts"]["dense"]["scores"]["image_alignment"]["mean"] == pytest.approx(
        expected, abs=1e-5
    )
    table = (tmp_path / "benchmark.md").read_text()
    assert "| setting | kept | single concept | multiple concepts |" in table


def test_a_judge_is_refused_where_there_is_none(concepts, tiny_model, tmp_path, monkeypatch, capsys):
    options = ["--benchmark", "customconcept101", "--data", concepts, "--output", tmp_path / "out", "--judge", "own"]
    code, _, err = evaluate(monkeypatch, capsys, tiny_model, *options)
    assert code == 2 and "judge is 'own', and customconcept101 has no judge: leave it out." in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="benchmark is 'mine': choose one of pie-bench, dreambench"):
        find_benchmark("mine")


# The authors' own words for the judge ---------------------------------------------------------------------------------


def test_published_words_come_from_the_authors_code(dreambench, omnicontext, tmp_path):
    animal, style = read_dreambench(str(dreambench))[0], read_dreambench(str(dreambench))[-1]
    for kind in ("subject", "style", "text"):
        for speaker in ("user", "gpt"):
            (tmp_path / f"{speaker}_prompt_{kind}_full.txt").write_text(f"{speaker} on {kind}\n")
    asked = {
        (sample.groups[0], question.name): question.published(tmp_path, sample)
        for sample in (animal, style)
        for question in BENCHMARKS["dreambench++"].questions
        if question.asked(sample)
    }
    assert asked["animal", "concept preservation"] == [
        ("user", "user on subject"),
        ("assistant", "gpt on subject"),
        ("user", ""),
    ]
    assert asked["style", "concept preservation"][0] == ("user", "user on style")
    assert asked["style", "prompt following"][2] == ("user", "a cat, 8")

    file = tmp_path / "prompt_generator.py"
    start = "_prompts_0shot_in_context_generation_rule_"
    names = [f"{start}{kind}_{case}" for kind in ("PF", "SC") for case in ("Scene", "Single_and_Multiple")]
    lines = ['_context_no_delimit = "first, "', *(f'{name} = "{name}: <instruction>"' for name in names)]
    file.write_text("\n".join([*lines, "raise SystemExit('it was run')"]))
    single, scene = read_omnicontext(str(omnicontext))
    prompt, subject = BENCHMARKS["omnicontext"].questions
    assert prompt.published(file, single) == [("user", f"first, {start}PF_Single_and_Multiple: a cat")]
    assert subject.published(file, scene) == [("user", f"first, {start}SC_Scene: a cat in the room")]
    with pytest.raises(ValueError, match="gone.py cannot be read .* or own"):
        check_wording([prompt], [single], str(tmp_path / "gone.py"))
    with pytest.raises(ValueError, match="user_prompt_subject_full.txt cannot be read .* or own"):
        check_wording(BENCHMARKS["dreambench++"].questions, [animal], str(tmp_path / "gone"))


def test_a_table_names_what_a_group_lacks():
    def cell(**scores):
        entries = {name: {"n": 1, "mean": value} for name, value in scores.items()}
        return {"samples": 1, "kept": None, "median_seconds": 0, "scores": entries}

    figures = {
        "all": {"dense": cell(clip_i=0.5)},
        GROUPS[0]: {"dense": cell()},
        GROUPS[1]: {"dense": cell(clip_i=0.25)},
    }
    table = paper_tables({"figures": figures}, BENCHMARKS["omnicontext"])
    assert table.splitlines()[-3:] == [
        "| setting | kept | single_character | single_object | all |",
        "| --- | --- | --- | --- | --- |",
        "| dense |  | - | 0.250 | 0.500 |",
    ]
    assert not math.isnan(figures["all"]["dense"]["scores"]["clip_i"]["mean"])
