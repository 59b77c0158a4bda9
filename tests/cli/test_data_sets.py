"""What `evaluate` and `train` read of a data set."""

import json

import pytest


@pytest.fixture
def table(inputs, tmp_path):
    """A folder of the datasets library with columns of other names; two of its three splits hold the same row."""
    datasets = pytest.importorskip("datasets")
    features = {
        "source": datasets.List(datasets.Image()),
        "target": datasets.Image(),
        "instruction": datasets.Value("string"),
        "recaption": datasets.Value("string"),
    }
    for split, reference, target, prompt in (
        ("train", "a.png", "b.png", "the cat"),
        ("validation", "c.png", "d.png", "the dog"),
        ("test", "c.png", "d.png", "the dog"),
    ):
        row = {"source": [str(inputs / reference)], "target": str(inputs / target), "instruction": prompt}
        row["recaption"] = f"{prompt}, again"
        made = datasets.Dataset.from_list([row], datasets.Features(features))
        made.to_parquet(tmp_path / "table" / f"{split}.parquet")
    return tmp_path / "table"


def settings(options):
    """What `train` is told in the place of these options of `evaluate`."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [part for name, value in pairs for part in ("--set", f"{name[2:].replace('-', '_')}={value}")]


NAMED = ["--image-column", "target", "--cond-image-column", "source", "--caption-column", "instruction"]


def sentence(err):
    """The one sentence of the command on stderr, where the datasets library has its bars too."""
    (said,) = [line for line in err.splitlines() if line.startswith("sparse-context: ")]
    assert "Traceback" not in err
    return said.removeprefix("sparse-context: ")


def test_evaluate_reads_the_split_and_the_columns_that_are_named(command, table, inputs, tmp_path):
    def measured(data, output, *options):
        code, _, err = command(
            "evaluate",
            "--data",
            data,
            "-m",
            "{model}",
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--metric",
            "psnr",
            "--keep",
            "0.5",
            "--selector",
            "random",
            "--output",
            output,
            *options,
        )
        assert code == 0, err
        record = json.loads((tmp_path / output / "result.json").read_text())
        figures = [cell["scores"] for cell in record["figures"]["all"].values()]
        return figures, [record["config"][key] for key in ("data_split", "data_config")]

    for name, reference, image, prompt in (
        ("first", "a.png", "b.png", "the cat"),
        ("other", "c.png", "d.png", "the dog"),
        ("again", "a.png", "b.png", "the cat, again"),
    ):
        row = {"references": [str(inputs / reference)], "image": str(inputs / image), "prompt": prompt}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    # a split does not matter to a manifest, and it is not in the record
    first, read = measured("first.jsonl", "1", "--split", "nonsense")
    other, again = (measured(f"{name}.jsonl", name)[0] for name in ("other", "again"))
    assert read == [None, None] and first != other and first != again
    assert measured("table", "2", *NAMED) == (first, ["train", "default"])
    assert measured("table", "3", *NAMED, "--split", "test") == (other, ["test", "default"])
    assert measured("table", "4", *NAMED, "--caption-column", "recaption") == (again, ["train", "default"])


def test_figures_of_another_split_are_not_gone_on_with(command, table, tmp_path):
    arguments = [
        "evaluate",
        "--data",
        "table",
        *NAMED,
        "-m",
        "{model}",
        "--device",
        "cpu",
        "--metric",
        "psnr",
        "--keep",
        "0.5",
        "--output",
        "out",
    ]
    assert command(*arguments, "--split", "test")[0] == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out" / "cells").iterdir()}
    assert command(*arguments, "--split", "test")[0] == 0
    for split in ("validation", "train"):  # the first has the same samples
        code, _, err = command(*arguments, "--split", split)
        assert code == 2 and sentence(err).endswith(
            f"dense.json is of data_split 'test' and not '{split}': give another folder, or remove it."
        )
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "cells").iterdir()} == files


@pytest.mark.parametrize("face", ["evaluate", "train"])
@pytest.mark.parametrize(
    ("options", "says"),
    {
        "--split tset": """The data set table does not load: Unknown split "tset". Should be one of ['train', """,
        "--dataset-config-name en": "does not load: BuilderConfig 'en' not found. Available: ['default'].",
        "--caption-column text": "has no column 'text' for the field 'prompt': its columns are source, target, instr",
        "--cond-image-column text": "has no column 'text' for the field 'references': its columns are source, target",
        "--image-column text": "has no column 'text' for the field 'image': its columns are source, target, instruct",
    }.items(),
)
def test_a_part_that_a_data_set_lacks(command, table, tmp_path, face, options, says):
    chosen = [*NAMED, *options.split(" ")]
    if face == "evaluate":
        face_options = ["--data", "table", "--output", "out", *chosen]
    else:  # where a setting that is made twice in different ways is refused
        names = dict(zip(chosen[::2], chosen[1::2], strict=True))
        face_options = ["--data", "table", "--output-dir", "out"]
        face_options += settings([part for pair in names.items() for part in pair])
    code, out, err = command(face, "-m", "{model}", *face_options)
    assert (code, out) == (2, "")
    assert says in sentence(err)
    assert not (tmp_path / "out").exists()


def test_validation_has_a_split_of_its_own(command, table, inputs, tmp_path, monkeypatch):
    def drawn(*options):
        """What ends the command: the prompt of the first sample that it opens for validation, or what is wrong."""
        code, out, err = command(
            "train", "-m", "{model}", "--data", "table", *settings(NAMED), "--output-dir", "out", *options
        )
        assert (code, out) == (2, "")
        assert not (tmp_path / "out").exists()
        return sentence(err)

    def stop(sample, *sides):
        raise ValueError(sample.prompt)

    monkeypatch.setattr("sparse_context.training.launch.open_example", stop)
    validated = ["--validation-data", "table"]
    assert drawn(*validated) == "the cat"
    assert drawn(*validated, "--set", "validation_split=test") == "the dog"
    assert drawn(*validated, "--set", "split=test") == "the dog"
    assert drawn(*validated, "--set", "split=test", "--set", "validation_split=train") == "the cat"
    row = {"source": [str(inputs / "a.png")], "target": str(inputs / "b.png"), "instruction": "the room"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert drawn("--validation-data", "rows.jsonl", "--set", "validation_split=tset") == "the room"
    assert "Unknown split \"tset\". Should be one of ['train', " in drawn(*validated, "--set", "validation_split=tset")
    assert drawn("--set", "validation_split=test") == (
        "validation_split is 'test', but there is no data for it: name it with --validation-data, which may be the "
        "same as data."
    )
