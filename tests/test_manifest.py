"""Samples: what a manifest or a data set gives, and that every bad row is named at once."""

import json
import os
import re
import tarfile

import numpy as np
import pytest
from PIL import Image
from tiny import picture

from sparse_context.samples import ManifestError, Sample, check_pictures, check_samples, read_samples


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("a", "b", "truth")):
        picture(96, 64, seed=i).save(tmp_path / f"{name}.png")
    Image.new("L", (96, 64), 255).save(tmp_path / "mask.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def write(folder, *rows):
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


GOOD = {"references": ["a.png"], "prompt": "a cat", "image": "truth.png"}


def test_a_row_becomes_a_sample_whose_pictures_open_when_asked(folder):
    row = {
        **GOOD,
        "references": ["a.png", "b.png"],
        "mask": "mask.png",
        "reference_masks": [None, "mask.png"],
        "task": "subject",
        "name": "cat",
        "source": "ignored",
    }
    (sample,) = read_samples(write(folder, row))
    paths = (folder / "a.png", folder / "b.png")
    assert sample == Sample(
        "cat", "a cat", paths, folder / "truth.png", folder / "mask.png", (None, folder / "mask.png"), "subject"
    )
    assert np.array_equal(sample.open_references()[1], Image.open(folder / "b.png"))
    assert sample.open_image().size == sample.open_mask().size == (96, 64)
    assert [m if m is None else m.mode for m in sample.open_reference_masks()] == [None, "L"]


def test_the_alpha_of_a_reference_is_its_mask(folder):
    rgba = picture(96, 64).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((96, 64)))
    rgba.save(folder / "cut.png")
    (sample,) = read_samples(write(folder, {**GOOD, "references": ["cut.png"]}))
    assert np.array_equal(sample.open_reference_masks()[0], rgba.getchannel("A"))


def test_names_default_to_lines_and_one_reference_needs_no_list(folder):
    samples = read_samples(write(folder, {**GOOD, "references": "a.png"}, "", GOOD))
    assert [s.name for s in samples] == ["000001", "000003"]
    assert samples[0].references == (folder / "a.png",) and len(samples[:]) == 2


def test_an_image_is_needed_unless_the_caller_can_do_without(folder):
    path = write(folder, {"references": ["a.png"], "prompt": ""})
    with pytest.raises(ManifestError, match="line 1 has no 'image'"):
        read_samples(path)
    assert read_samples(path, needs_image=False)[0].open_image() is None


def test_every_bad_row_is_named_at_once(folder):
    path = write(
        folder,
        GOOD,
        "{",
        "[1]",
        {"references": [], "prompt": 7, "image": "truth.png"},
        {"refrences": ["a.png"], "prompt": "x", "image": "truth.png"},
        {**GOOD, "references": ["a.png", 3]},
        {**GOOD, "references": ["missing.png", "text.png"]},
        {**GOOD, "mask": "small.png"},
        {**GOOD, "reference_masks": ["mask.png", "mask.png"]},
        {**GOOD, "name": "a/b"},
        {**GOOD, "name": "twin"},
        {**GOOD, "name": "twin"},
        '{"references": "a.png", "image": "truth.png", "prompt": "a \\ud83d cat"}',
        '{"references": "a.png", "image": "truth.png", "prompt": "a cat", "prompt": "a dog"}',
    )
    problems = check_samples(path)
    expected = [
        "line 2 is no JSON",
        "line 3 is no JSON object",
        "line 4 has no 'references'",
        "line 4: 'prompt' is 7",
        "line 5 has 'refrences': write 'references'",
        "line 5 has no 'references'",
        "line 6: 'references' has 3 where",
        "line 7: ",
        "line 7: ",
        "line 8: the mask",
        "line 9 has 2 reference masks for 1 references",
        "line 10: the name 'a/b'",
        "line 12 has the name 'twin' of line 11",
        "line 13: 'prompt' holds half of a character",
        "line 14 has 'prompt' twice: write it once.",
    ]
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True)), problems
    assert "missing.png" in problems[7] and "text.png" in problems[8]
    with pytest.raises(ManifestError, match=r"line 2 is no JSON.*\(11 more problems: check_samples"):
        read_samples(path)


def test_more_references_than_a_model_takes_are_named(folder):
    path = write(folder, GOOD, {**GOOD, "references": ["a.png"] * 3})
    assert check_samples(path, most_references=3) == []
    said = "line 2 has 3 references, and the model takes at most 2: list fewer."
    assert check_samples(path, most_references=2) == [said]
    with pytest.raises(ManifestError, match=said):
        read_samples(path, most_references=2)


def test_no_file_and_no_rows_are_said(folder):
    cases = (
        (folder / "nothing.jsonl", "does not exist"),
        ("no-folder/train.jsonl", "does not exist"),
        (write(folder, ""), "holds no sample"),
    )
    for source, message in cases:
        for function in (read_samples, check_samples):
            with pytest.raises(ManifestError, match=message):
                function(source)
    with pytest.raises(ManifestError, match="cannot be read as text"):
        read_samples(folder / "a.png")
    with pytest.raises(ManifestError, match="no field 'images'"):
        read_samples(write(folder, GOOD), columns={"images": "x"})


@pytest.mark.parametrize("kind", ["saved", "parquet", "imagefolder"])
def test_a_data_set_of_the_datasets_library_is_read_alike(folder, kind):
    datasets = pytest.importorskip("datasets")
    columns = {"image": "target", "references": "source", "prompt": "instruction"}
    where = folder / "set"
    if kind == "imagefolder":
        where.mkdir()
        for name in ("a.png", "truth.png"):
            (where / name).write_bytes((folder / name).read_bytes())
        rows = {"source_file_name": "a.png", "target_file_name": "truth.png", "instruction": "a cat"}
        (where / "metadata.jsonl").write_text(json.dumps(rows))
    else:
        pictures = {"source": [[str(folder / "a.png")]], "target": [str(folder / "truth.png")]}
        features = {
            "source": datasets.List(datasets.Image()),
            "target": datasets.Image(),
            "instruction": datasets.Value("string"),
        }
        table = datasets.Dataset.from_dict({**pictures, "instruction": ["a cat"]}, datasets.Features(features))
        if kind == "saved":
            table.save_to_disk(where)
        else:
            where.mkdir()
            table.to_parquet(where / "train.parquet")
    samples = read_samples(where, columns=columns)
    assert len(samples) == 1 and samples[0].prompt == "a cat"
    assert np.array_equal(samples[0].open_image(), Image.open(folder / "truth.png"))
    assert np.array_equal(samples[0].open_references()[0], Image.open(folder / "a.png"))
    assert check_samples(where, columns=columns) == []
    with pytest.raises(ManifestError, match="no column 'references' for the field 'references'"):
        read_samples(where)


def rows(name):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"references": [name], "prompt": [name]})


def test_a_split_and_a_config_of_a_data_set_are_read_and_told(tmp_path):
    for config in ("one", "two"):
        for split in ("train", "test"):
            rows(f"{config}, {split}").to_parquet(tmp_path / config / f"{split}.parquet")
    parts = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}.parquet\n" for split in ("train", "test"))
        for config in ("one", "two")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    for config in ("one", "two"):
        for split in ("train", "test"):
            samples = read_samples(tmp_path, split=split, config=config, needs_image=False)
            assert [sample.prompt for sample in samples] == [f"{config}, {split}"]
            assert (samples.split, samples.config) == (split, config)
    for config, says in (("three", "'three' not found. Available: "), (None, "among the available configs: ")):
        with pytest.raises(ManifestError, match=re.escape(f"{says}['one', 'two']")):
            read_samples(tmp_path, config=config, needs_image=False)


def test_what_was_saved_to_disk_may_have_splits_and_has_no_config(folder):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({split: rows(split) for split in ("train", "test")}).save_to_disk(folder / "splits")
    rows("all").save_to_disk(folder / "single")
    for name, split, prompt, told in (("splits", "test", "test", "test"), ("single", "test", "all", None)):
        samples = read_samples(folder / name, split=split, config="one", needs_image=False)
        assert [sample.prompt for sample in samples] == [prompt]
        assert (samples.split, samples.config) == (told, None)
    with pytest.raises(ManifestError, match=r"""Unknown split "tset"\. Should be one of \['train', 'test'\]\.$"""):
        read_samples(folder / "splits", split="tset", needs_image=False)
    samples = read_samples(write(folder, GOOD), split="tset", config="one")
    assert len(samples) == 1 and (samples.split, samples.config) == (None, None)


def test_kinds_of_data_that_may_hold_pickles_are_refused(folder):
    pytest.importorskip("datasets")
    (folder / "set" / "data").mkdir(parents=True)
    with tarfile.open(folder / "set" / "data" / "train.tar", "w") as tar:  # of a kind whose .pyd members are unpickled
        tar.add(folder / "a.png", "a.png")
    with pytest.raises(ManifestError, match="only arrow, csv, imagefolder, json, parquet are read, for safety"):
        read_samples(folder / "set")


@pytest.mark.usefixtures("impatient")
def test_a_hub_name_out_of_reach_is_one_sentence():
    pytest.importorskip("datasets")
    with pytest.raises(ManifestError, match="The data set some/where does not load: "):
        read_samples("some/where")


# Manifests of other systems -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", ["sub\\deep\\c.png", ".\\sub\\deep\\c.png", "sub/deep\\c.png", "sub\\deep/../deep/c.png"]
)
def test_backslashes_are_slashes_where_no_file_has_them(entry, folder):
    (folder / "sub" / "deep").mkdir(parents=True)
    picture(96, 64).save(folder / "sub" / "deep" / "c.png")
    Image.new("L", (96, 64), 255).save(folder / "sub" / "deep" / "mask.png")
    mask = entry.replace("c.png", "mask.png")
    row = {**GOOD, "references": [entry], "image": entry, "mask": mask, "reference_masks": [mask]}
    (sample,) = read_samples(write(folder, row))
    check_pictures(read_samples(write(folder, row)))
    assert sample.references[0].resolve() == folder / "sub" / "deep" / "c.png" and sample.open_mask().size == (96, 64)
    assert check_samples(write(folder, row)) == []


@pytest.mark.skipif(os.name == "nt", reason="there it is no letter of a name")
def test_a_file_with_a_backslash_in_its_name_is_that_file(folder):
    picture(32, 32).save(folder / "a\\b.png")
    (folder / "a").mkdir()
    picture(96, 64).save(folder / "a" / "b.png")
    (sample,) = read_samples(write(folder, {**GOOD, "references": ["a\\b.png"]}))
    assert sample.open_references()[0].size == (32, 32)


@pytest.mark.skipif(os.name == "nt", reason="there it is a path")
@pytest.mark.parametrize("entry", ["C:\\data\\a.png", "d:/data/a.png", "\\\\server\\share\\a.png"])
@pytest.mark.parametrize("field", ["references", "image", "mask", "reference_masks"])
def test_a_path_on_a_drive_of_windows_is_told_for_what_it_is(entry, field, folder):
    row = {**GOOD, field: [entry] if field.startswith("ref") else entry}
    with pytest.raises(
        ManifestError, match=f"line 1: '{field}' has .*a.png', a path of a Windows machine: write it rel"
    ):
        read_samples(write(folder, row))


@pytest.mark.skipif(os.name == "nt", reason="there it is a path")
def test_a_long_path_of_windows_is_told_too_and_a_long_relative_one_is_lost(folder, monkeypatch):
    """On Linux it is a single name, longer than names can be."""
    long = "\\".join(["a" * 60] * 5) + ".png"
    with pytest.raises(ManifestError, match="a path of a Windows machine"):
        read_samples(write(folder, {**GOOD, "references": [f"C:\\{long}"]}))
    samples = read_samples(write(folder, {**GOOD, "references": [long]}, {**GOOD, "references": ["b" * 300]}))
    with pytest.raises(ManifestError, match="The sample 000001 cannot be used: .* does not exist"):
        check_pictures(samples)
    monkeypatch.setattr("sparse_context.samples.read.CHECKED", 0)
    with pytest.raises(ManifestError, match="The sample 000001 cannot be used: .* does not exist"):
        check_pictures(samples)
    (folder / long.replace("\\", "/")).parent.mkdir(parents=True)
    picture(32, 32).save(folder / long.replace("\\", "/"))
    with pytest.raises(ManifestError, match="The sample 000002 cannot be used: .* does not exist"):
        check_pictures(samples)


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_a_folder_that_looks_like_a_drive_is_a_folder(folder):
    (folder / "C:").mkdir()
    picture(32, 32).save(folder / "C:" / "a.png")
    (sample,) = read_samples(write(folder, {**GOOD, "references": ["C:/a.png"]}))
    assert sample.open_references()[0].size == (32, 32)


@pytest.mark.parametrize(
    "name", ["con", "NUL", "com1.x", "a.", "a ", "a:b", "a?b", "a*", "<a>", '"a"', "a|b", "a\\b", "a/b"]
)
def test_names_that_no_file_has_on_some_system_are_told(name, folder):
    with pytest.raises(ManifestError, match="line 1: the name .* cannot be that of a file: "):
        read_samples(write(folder, {**GOOD, "name": name}))


def test_names_that_differ_in_capitals_alone_are_one(folder):
    with pytest.raises(ManifestError, match="line 2 has the name 'cat', which is 'Cat' on Windows or macOS, of line 1"):
        read_samples(write(folder, {**GOOD, "name": "Cat"}, {**GOOD, "name": "cat"}))


def test_a_manifest_with_the_line_ends_of_windows_is_read(folder):
    path = folder / "manifest.jsonl"
    line = json.dumps({**GOOD, "prompt": "größer"}, ensure_ascii=False) + "\r\n"
    path.write_bytes((2 * line).encode("utf-8-sig"))
    assert [sample.prompt for sample in read_samples(path)] == ["größer"] * 2
