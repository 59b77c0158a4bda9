"""Data in the forms of other trainers, each made here as its own documentation describes it, read as one."""

import http.server
import io
import json
import sys
import tarfile
import threading
import zipfile
from functools import partial

import numpy as np
import pytest
from PIL import Image
from tiny import picture

from sparse_context.cli import main
from sparse_context.images import open_picture
from sparse_context.samples import ManifestError, Member, check_pictures, check_samples, read_samples, write_manifest
from sparse_context.samples.ai_toolkit import _load_once_each
from sparse_context.samples.archives import KEPT, _fetched, forget_fetched
from sparse_context.samples.shards import expand


def draw(folder, *names):
    """Pictures that differ, by their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(96, 64, seed=sum(name.encode())).save(folder / name)


def read(source, **options):
    """What is read of a source: prompts, and the pictures' own bytes."""

    def content(entry):
        return entry if isinstance(entry, bytes) else entry.read() if isinstance(entry, Member) else entry.read_bytes()

    samples = read_samples(source, **options)
    check_pictures(samples)
    assert check_samples(source, **options) == []
    return [(sample.prompt, [content(each) for each in sample.references], content(sample.image)) for sample in samples]


def run(monkeypatch, capsys, *arguments):
    """The command: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["sparse-context", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


def problems(source, **options):
    with pytest.raises(ManifestError) as error:
        read_samples(source, **options)
    return str(error.value)


# Pairs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "pairs"
    draw(folder, "a_start.png", "a_end.jpg", "b_start.png", "b_start2.png", "b_start3.webp", "b_end.png")
    (folder / "a.txt").write_text("make it red\n")
    (folder / "b.txt").write_text("both in a room", encoding="utf-8-sig")
    return folder


def pack(folder, path, top=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, top + file.name)
        archive.writestr("__MACOSX/._a_start.png", b"no picture")
    return path


def test_a_file_that_an_archive_lacks_is_told_before_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_context.samples.read.CHECKED", 1)
    picture(64, 64).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    rows = [{"references": [f"p.zip/{name}.png"], "image": "a.png", "prompt": "x"} for name in ("a", "b")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ManifestError, match="sample 000002 .*b.png' does not exist; check the name, and what the archive"
    ):
        check_pictures(read_samples(tmp_path / "m.jsonl"))


@pytest.mark.parametrize("form", ["folder", "zip", "zip with a folder in it"])
def test_pairs_by_their_names(pairs, form, tmp_path):
    source = pairs if form == "folder" else pack(pairs, tmp_path / "p.zip", "photos/" if "with" in form else "")
    files = {path.name: path.read_bytes() for path in pairs.iterdir()}
    starts = [files[name] for name in ("b_start.png", "b_start2.png", "b_start3.webp")]
    assert read(source) == [
        ("make it red", [files["a_start.png"]], files["a_end.jpg"]),
        ("both in a room", starts, files["b_end.png"]),
    ]
    assert read_samples(source).notes == ()


def test_what_is_wrong_with_pairs_is_named(pairs, tmp_path):
    draw(pairs, "c_start.png", "plain.png")
    draw(pairs, "d_start0.png", "d_start1.png")  # not one of these is the image to be made
    assert "d has no d_end image: add it, or leave the others out." in check_samples(pairs)
    for name in ("d_start0.png", "d_start1.png"):
        (pairs / name).unlink()
    assert f"{pairs}: 1 other pictures, such as plain.png, are not used." in _notes_of_the_good(pairs)
    (pairs / "b.txt").unlink()
    assert problems(pairs) == (
        f"{pairs}, b has no prompt: write it into b.txt (1 more problems: check_samples lists them all)."
    )
    assert check_samples(pairs) == [
        "b has no prompt: write it into b.txt.",
        "c has no c_end image: add it, or leave the others out.",
    ]
    draw(pairs, "a_end.png")
    assert "has both a_end.jpg and a_end.png: leave one of them out" in problems(pairs)
    draw(tmp_path / "other", "x.png")
    assert "holds no pictures that are named as cat_start.png" in problems(pack(tmp_path / "other", tmp_path / "o.zip"))
    (tmp_path / "no.zip").write_bytes(b"no zip")
    assert "cannot be read (File is not a zip file); pack it again" in problems(tmp_path / "no.zip")


def _notes_of_the_good(pairs):
    draw(pairs, "c_end.png")
    (pairs / "c.txt").write_text("c")
    notes = read_samples(pairs).notes
    (pairs / "c_end.png").unlink()
    return notes


# ai-toolkit -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path):
    """A folder of images with captions, and two of controls; names end in other formats, and one control is missing."""
    folder = tmp_path / "data"
    draw(folder / "target", "image2.jpg", "image10.png", "sub/deep.png")
    draw(folder / "control_1", "image2.png", "image10.png", "deep.png")
    draw(folder / "control_2", "image2.webp", "image10.jpg")
    draw(folder / "target" / "_controls", "image2.depth.jpg")
    for name, text in (("image2", "a [trigger] cat"), ("image10", "a dog"), ("sub/deep", "deep")):
        (folder / "target" / f"{name}.txt").write_text(text)
    return folder


def expected(folder, first="a [trigger] cat"):
    def of(name):
        return (folder / name).read_bytes()

    return [
        (first, [of("control_1/image2.png"), of("control_2/image2.webp")], of("target/image2.jpg")),
        ("a dog", [of("control_1/image10.png"), of("control_2/image10.jpg")], of("target/image10.png")),
        ("deep", [of("control_1/deep.png")], of("target/sub/deep.png")),
    ]


def test_folders_of_ai_toolkit(toolkit):
    assert read(toolkit) == expected(toolkit)
    (toolkit / "target" / "image10.txt").unlink()
    draw(toolkit / "target", "new.png")
    assert check_samples(toolkit) == [
        "target/image10.png has no caption: write it into image10.txt.",
        "target/new.png has no control, which is its reference: put one of that name into control_1.",
    ]
    (toolkit / "control_1" / "image2.png").rename(toolkit / "gone.png")
    assert check_samples(toolkit)[0] == (
        "target/image2.jpg has no control in control_1, but in a later folder: put one there."
    )
    (toolkit / "gone.png").rename(toolkit / "control_1" / "image2.png")
    (toolkit / "control_1" / "deep.txt").write_text("a caption")
    assert problems(toolkit) == (
        f"{toolkit} has captions in control_1 and target: leave them beside the images to be made alone."
    )


@pytest.mark.parametrize("kind", ["pairs", "toolkit", "musubi"])
def test_columns_of_a_layout_that_has_names_of_its_own_are_refused(kind, request):
    source = request.getfixturevalue(kind)
    with pytest.raises(ManifestError, match="has names of its own for its fields: leave prompt as long out.$"):
        read_samples(source, columns={"prompt": "long", "image": "image"})


def training(toolkit, **settings):
    import yaml

    part = {"folder_path": str(toolkit / "target"), "caption_ext": "txt", **settings}
    record = {
        "job": "extension",
        "config": {"name": "first", "process": [{"type": "sd_trainer", "trigger_word": "p3r5on", "datasets": [part]}]},
    }
    path = toolkit.parent / "train.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


@pytest.mark.parametrize("how", ["list", "numbered", "relative"])
def test_the_training_file_of_ai_toolkit(toolkit, how):
    folders = [str(toolkit / "control_1"), str(toolkit / "control_2")]
    settings = {
        "list": {"control_path": folders},
        "numbered": {"control_path_1": folders[0], "control_path_2": folders[1]},
        "relative": {"control_path": ["data/control_1", "data/control_2"]},
    }[how]
    usual = {"caption_dropout_rate": 0.05, "shuffle_tokens": False, "resolution": [512, 768], "num_repeats": 2}
    path = training(toolkit, **settings, **usual)
    assert read(path) == expected(toolkit, "a p3r5on cat")
    assert read_samples(path).notes == (
        f"{path}: caption_dropout_rate, num_repeats and resolution are not used; this run's own settings apply.",
        f"{path}: the trigger word takes the place of [trigger] in captions, and is added to no other.",
    )


def test_a_default_caption_and_masks_of_ai_toolkit(toolkit):
    (toolkit / "target" / "image10.txt").unlink()
    (toolkit / "masks").mkdir()
    Image.new("L", (96, 64), 255).save(toolkit / "masks" / "image10.png")
    path = training(
        toolkit, control_path=str(toolkit / "control_1"), default_caption="any", mask_path=str(toolkit / "masks")
    )
    samples = read_samples(path)
    assert [sample.prompt for sample in samples] == ["a p3r5on cat", "any", "deep"]
    assert [sample.mask is None for sample in samples] == [True, False, True]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "target/image2.jpg has no control, which is its reference: name control_path"),
        ({"control_path": "gone"}, "data set 1: the folder 'gone' does not exist; correct the path."),
        ({"control_from_same_folder": True}, "has control_from_same_folder, so it draws its controls at random"),
        ({"num_frames": 41}, "has num_frames, so it is of videos, which is not supported"),
        ({"folder_path": None}, "data set 1: the folder None does not exist"),
        ({"folder_path": "a" * 5000}, "does not exist; correct the path."),
        ({"trigger_word": 5}, "data set 1: trigger_word is 5: write text"),
        ({"default_caption": ["a"]}, "data set 1: default_caption is ['a']: write text"),
        ({"caption_ext": "a/b"}, "data set 1: the suffix of captions is 'a/b': write one such as .txt."),
    ],
)
def test_what_is_wrong_with_a_training_file_is_named(settings, said, toolkit):
    assert said in problems(training(toolkit, **settings))


def test_a_caption_of_ai_toolkit_may_be_json_or_the_default_of_a_folder(toolkit):
    (toolkit / "target" / "image2.json").write_text('{"caption": "of json"}')
    (toolkit / "target" / "default.txt").write_text("of all")
    (toolkit / "target" / "sub" / "default.txt").write_text("of the folder below")
    path = training(toolkit, control_path=str(toolkit / "control_1"), caption_ext="json")
    assert [sample.prompt for sample in read_samples(path)] == ["of json", "of all", "of the folder below"]
    (toolkit / "target" / "image2.json").write_text("[]")
    assert "image2.json has no text" in problems(path)


def test_a_key_that_comes_twice_in_a_training_file_is_named(toolkit):
    path = training(toolkit)
    path.write_text(path.read_text() + "job: another\n")
    assert "has 'job' a second time: write it once" in problems(path)


def test_keys_that_a_yaml_merges_may_be_written_again():
    assert _load_once_each("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  b: 3\n")["d"] == {"b": 3, "c": 2}


@pytest.mark.parametrize(
    "text",
    ["a: [", "[" * 5000, "a: 2024-13-45", "a: 1", "- 1", "config: {process: 3}", "config: {process: [{datasets: 4}]}"],
)
def test_another_yaml_is_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    assert f"{tmp_path / 'x.yaml'}" in problems(tmp_path / "x.yaml")


# musubi-tuner ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def musubi(tmp_path):
    """Both kinds of data sets: a folder, where one image has several controls, and lines."""
    draw(tmp_path / "images", "image1.jpg", "image1_1.png", "image2.png")
    draw(tmp_path / "controls", "image1.png", "image1_1_0001.png", "image1_1_0000.png", "image2_2.png", "image2.jpg")
    for name in ("image1", "image1_1", "image2"):
        (tmp_path / "images" / f"{name}.txt").write_text(f"of {name}")
    draw(tmp_path / "others", "x.png", "y.png", "z.png")
    lines = [
        {"image_path": str(tmp_path / "others/x.png"), "control_path": "others/y.png", "caption": "one"},
        {"image_path": "others/x.png", "control_path_1": "others/z.png", "control_path_0": "others/y.png"},
    ]
    lines[1]["caption"] = "two"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    path = tmp_path / "data.toml"
    path.write_text(
        f"""
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
image_directory = "{(tmp_path / "images").as_posix()}"
control_directory = "{(tmp_path / "controls").as_posix()}"
cache_directory = "/nowhere"
num_repeats = 2

[[datasets]]
image_jsonl_file = "rows.jsonl"
no_resize_control = true
"""
    )
    return path


def test_data_sets_of_musubi_tuner(musubi):
    def of(*names):
        return [(musubi.parent / name).read_bytes() for name in names]

    assert read(musubi) == [
        ("of image1", of("controls/image1.png"), *of("images/image1.jpg")),
        ("of image1_1", of("controls/image1_1_0000.png", "controls/image1_1_0001.png"), *of("images/image1_1.png")),
        ("of image2", of("controls/image2.jpg", "controls/image2_2.png"), *of("images/image2.png")),
        ("one", of("others/y.png"), *of("others/x.png")),
        ("two", of("others/y.png", "others/z.png"), *of("others/x.png")),
    ]
    assert read_samples(musubi).notes == (
        f"{musubi}: batch_size, cache_directory, enable_bucket, no_resize_control, num_repeats and resolution are not "
        "used; this run's own settings apply.",
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("image_directory", "video_directory", "data set 1 has video_directory, so it is of videos"),
        ("num_repeats = 2", "multiple_target = true", "has several images to be made of each row"),
        ("control_directory", "other", "data set 1: the folder None does not exist"),
        ('"rows.jsonl"', '"gone.jsonl"', "data set 2: the file 'gone.jsonl' does not exist"),
        ("[[datasets]]", "[[sets]]", "has no [[datasets]]"),
        ("[general]", "[general", "cannot be read"),
        ('caption_extension = ".txt"', 'caption_extension = ".cap"', "images/image1.jpg has no caption: write it into"),
        ('caption_extension = ".txt"', 'caption_extension = "/x"', "the suffix of captions is '/x': write one such as"),
        ("[general]", "a = " + "[" * 5000, "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_toml_is_named(old, new, said, musubi):
    musubi.write_text(musubi.read_text().replace(old, new))
    assert said in problems(musubi)


def test_two_files_for_one_place_are_named(musubi):
    draw(musubi.parent, "images/image2.bmp", "controls/image1.jpg", "controls/image1_1_0.png")
    assert check_samples(musubi) == [
        "images/image2.png has the place of image2.bmp too: leave one of them out.",
        "controls/image1.png has the place of image1.jpg too: leave one of them out.",
        "controls/image1_1_0000.png has the place of image1_1_0.png too: leave one of them out.",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"control_path": "x.png", "control_path_0": "y.png"}', "line 1 has both control_path and control_path_0"),
        ('{"caption": "a", "caption": "b"}', "rows.jsonl, line 1 has 'caption' twice: write it once."),
        ("{", "rows.jsonl, line 1 is no JSON"),
        ("[]", "rows.jsonl, line 1 is no JSON object"),
        ('{"image_path_0": "x.png"}', "rows.jsonl, line 1 has several images to be made"),
        ('{"image_path": "x.png", "caption": "a"}', "rows.jsonl, line 1 has no 'references'"),
        ('{"image_path": 3, "caption": "a", "control_path": "x.png"}', "line 1: 'image' has 3 where the path"),
        ('{"image_path": "x.png", "control_path": "x.png"}', "rows.jsonl, line 1 has no 'prompt'"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(line, said, musubi):
    (musubi.parent / "rows.jsonl").write_text(line)
    assert said in problems(musubi)


# Columns of diffusers -------------------------------------------------------------------------------------------------


def test_columns_as_the_scripts_of_diffusers_call_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    draw(tmp_path, "a.png", "b.png")
    columns = {"instance_image": [str(tmp_path / "b.png")], "cond_image": [str(tmp_path / "a.png")], "text": ["red"]}
    kinds = {"instance_image": datasets.Image(), "cond_image": datasets.Image(), "text": datasets.Value("string")}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, datasets.Features(kinds)).to_parquet(tmp_path / "set" / "train.parquet")
    assert read(tmp_path / "set") == [
        ("red", [(tmp_path / "a.png").read_bytes()], (tmp_path / "b.png").read_bytes()),
    ]
    assert read_samples(tmp_path / "set").notes == (
        f"{tmp_path / 'set'}: reads the column instance_image as image, cond_image as references, text as prompt; name "
        "other columns where that is wrong.",
    )
    swapped = {"image": "cond_image", "references": "instance_image"}
    assert np.array_equal(
        read_samples(tmp_path / "set", columns=swapped)[0].open_image(), picture(96, 64, seed=sum(b"a.png"))
    )


# Shards ---------------------------------------------------------------------------------------------------------------


def png(seed):
    file = io.BytesIO()
    picture(96, 64, seed=seed).save(file, "png")
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three shards of three samples, whose pictures have the numbers 10 * shard + 2 * sample, and one more."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for s in range(3):
        files = {}
        for i in range(3):
            files |= {
                f"{i:04}.reference0.png": png(10 * s + 2 * i),
                f"{i:04}.image.png": png(10 * s + 2 * i + 1),
                f"{i:04}.prompt.txt": f"sample {i} of shard {s}".encode(),
            }
        write_tar(folder / f"train-{s:03}.tar", files)
    return folder


EXPECTED = [(f"sample {i} of shard {s}", [10 * s + 2 * i], 10 * s + 2 * i + 1) for s in range(3) for i in range(3)]


def as_bytes(rows):
    return [(prompt, [png(seed) for seed in references], png(image)) for prompt, references, image in rows]


@pytest.mark.parametrize("form", ["{folder}", "{folder}/train-{{000..002}}.tar", "{folder}/train-00{{0,1,2}}.tar"])
def test_shards_are_read_in_their_order(shards, form):
    assert read(form.format(folder=shards)) == as_bytes(EXPECTED)


def test_names_that_braces_stand_for():
    assert list(expand("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(expand("{a,b}/{1..2}.tar")) == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]
    assert list(expand("plain.tar")) == ["plain.tar"]
    assert "{0..999999999}.tar stands for more than 100000 shards: name a folder" in problems("{0..999999999}.tar")
    assert "{5..2}.tar stands for no shard: write the smaller number first." in problems("{5..2}.tar")


def test_fields_of_a_shard(tmp_path):
    mask = io.BytesIO()
    Image.new("L", (96, 64), 255).save(mask, "png")
    files = {
        "a/x.json": json.dumps({"prompt": "two", "task": "subject", "aligned": True}).encode(),
        "a/x.reference0.png": png(0),
        "a/x.reference1.png": png(1),
        "a/x.reference_mask1.png": mask.getvalue(),
        "a/x.image.png": png(2),
        "a/x.mask.png": mask.getvalue(),
        "a/x.pickle": b"not read",
        "y.jpg": png(3),
        "y.source.png": png(4),
        "y.txt": b"plain",
    }
    write_tar(tmp_path / "s.tar", files)
    source = tmp_path / "s.tar"
    columns = {"image": "jpg", "references": "source", "prompt": "txt"}
    assert "s.tar/y has no 'references'" in " ".join(check_samples(source))
    write_tar(tmp_path / "y.tar", {name: content for name, content in files.items() if name.startswith("y")})
    assert read(tmp_path / "y.tar", columns=columns) == [("plain", [png(4)], png(3))]
    write_tar(source, {name: content for name, content in files.items() if name.startswith("a")})
    (sample,) = read_samples(source)
    assert (sample.prompt, sample.task, sample.aligned, len(sample.references)) == ("two", "subject", True, 2)
    assert [each is None for each in sample.open_reference_masks()] == [True, False]
    assert sample.open_mask().size == (96, 64)


class Counting(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


def test_shards_as_other_programs_pack_them(tmp_path):
    """Suffixes in capitals, hidden files and files without a suffix, a caption in a .json, a link to another file."""
    draw(tmp_path, "x.png")
    content = (tmp_path / "x.png").read_bytes()
    files = {"._a.image.png": b"", "README": b"", "a.IMAGE.PNG": content, "a.ref.png": content}
    write_tar(tmp_path / "x.TAR", files | {"a.json": b'{"caption": "red", "prompt": "other"}'})
    columns = {"prompt": "caption", "references": "ref"}
    assert read(tmp_path / "x.TAR", columns=columns) == [("red", [content], content)]
    with tarfile.open(tmp_path / "x.TAR", "a") as tar:
        for name in ("b.image.png", "b.reference0.png"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, "a.ref.png"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("b.prompt.txt"))
    assert read(tmp_path / "x.TAR", columns={"references": "ref"})[1] == ("", [content], content)


@pytest.fixture
def server(shards):
    """The folder of shards at a URL of this machine, and what was asked for."""
    Counting.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=str(shards))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Counting.asked
        server.shutdown()
        thread.join()
    forget_fetched()


def test_shards_at_a_url_stream_shard_by_shard(server, shards, tmp_path):
    """A pass reads each shard once, whatever its order within; any batch comes of its number alone."""
    pytest.importorskip("aiohttp")
    from sparse_context.training.data import Batches

    url, asked = server
    samples = read_samples(f"{url}/train-{{000..002}}.tar")
    write_manifest(samples, tmp_path / "m.jsonl")
    assert (
        json.loads((tmp_path / "m.jsonl").read_text().splitlines()[4])["image"] == f"{url}/train-001.tar/0001.image.png"
    )
    forget_fetched()
    samples = read_samples(tmp_path / "m.jsonl")
    asked.clear()
    batches = Batches(samples, 1, 7, 512, 512)
    prompts = [batches(number)[0].prompt for number in range(9)]
    assert sorted(prompts) == sorted(prompt for prompt, _, _ in EXPECTED)
    assert len(asked) == len(set(asked)) == 3
    assert len(_fetched) == KEPT
    order = [prompt[-1] for prompt in prompts]
    assert order == [order[0]] * 3 + [order[3]] * 3 + [order[6]] * 3
    assert prompts != sorted(prompts) and [batches(9 + n)[0].prompt for n in range(9)] != prompts
    resumed = Batches(read_samples(tmp_path / "m.jsonl"), 1, 7, 512, 512)
    assert [resumed(number)[0].prompt for number in (5, 6)] == prompts[5:7]
    local = Batches(read_samples(shards), 1, 7, 512, 512)
    assert [local(number)[0].prompt for number in range(9)] == prompts
    with pytest.raises(ManifestError, match="train_batch_size is 2, and the sizes of images in shards at a URL"):
        Batches(samples, 2, 7, 512, 512)


def test_what_is_wrong_with_shards_is_named(shards, server):
    url, _ = server
    assert "gone-0.tar' cannot be read" in problems(f"{url}/gone-{{0..1}}.tar").replace(
        "cannot be fetched", "cannot be read"
    )
    assert "gone.tar' does not exist" in problems(shards / "gone.tar")
    content = (shards / "train-000.tar").read_bytes()
    (shards / "train-000.tar").write_bytes(content[:3000])
    assert "train-000.tar' cannot be read (unexpected end of data)" in problems(shards)
    with tarfile.open(shards / "train-001.tar") as tar:
        header = [info.offset for info in tar][4]
    for cut in (header, header + 100):  # in none of these does the library see anything wrong
        (shards / "train-000.tar").write_bytes(content[:cut])
        assert "train-000.tar' cannot be read (it is cut short)" in problems(shards)
    (shards / "train-000.tar").write_bytes(content[:header] + b"x" + content[header + 1 :])
    assert f"cannot be read (its header at byte {header} is damaged" in problems(shards)
    (shards / "train-000.tar").write_bytes(content + content)
    assert "or another .tar follows there)" in problems(shards)
    (shards / "train-000.tar").write_bytes(b"no tar" * 200)
    assert "train-000.tar' cannot be read" in problems(shards)
    write_tar(shards / "train-000.tar", {"a.json": b"{"})
    assert "train-000.tar/a.json is no JSON" in problems(shards)
    named = {f"{n}.{field}": b"x" for n in "ab" for field in ("image.png", "reference0.png", "prompt.txt")}
    named |= {"a.json": b'{"name": "one"}', "b.json": b'{"name": "One"}'}
    write_tar(shards / "train-000.tar", dict(sorted(named.items())))
    assert "train-000.tar/b has the name 'One', which is 'one' on Windows or macOS, of " in problems(shards)
    for extra, said in (
        ("a.image.jpg", "train-000.tar/a has both a.image.jpg and a.image.png: leave one of them out"),
        ("a.reference00.png", "train-000.tar/a has both a.reference0.png and a.reference00.png: leave one"),
        ("a.reference_mask1.png", "train-000.tar/a has reference_mask1 and no reference1: add that"),
    ):
        write_tar(shards / "train-000.tar", dict(sorted({**named, extra: b"x"}.items())))
        assert said in problems(shards)


# Written down ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "zip", "toolkit", "musubi", "shards"])
def test_a_manifest_of_a_layout_holds_the_same(kind, request, tmp_path, monkeypatch, capsys):
    source = request.getfixturevalue("pairs" if kind == "zip" else kind)
    source = pack(source, tmp_path / "p.zip") if kind == "zip" else source
    (tmp_path / "new").mkdir()
    path = tmp_path / "new" / "m.jsonl"
    code, out, err = run(monkeypatch, capsys, "manifest", source, "--output", path)
    assert code == 0 and out.strip() == f"wrote {path}: {len(read_samples(source))} samples"
    assert err.splitlines() == list(read_samples(source).notes)
    assert read(path) == read(source)
    assert ".." in path.read_text() and str(tmp_path) not in path.read_text()


def test_a_manifest_of_a_data_set_has_its_pictures_in_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    draw(tmp_path, "a.png", "b.jpg")
    first, second = ({"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("a.png", "b.jpg"))
    image, text = datasets.Image(), datasets.Value("string")
    features = {"references": datasets.List(image), "image": image, "prompt": text}
    row = {"references": [[first, second]], "image": [second], "prompt": ["kätzchen"]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(row, datasets.Features(features)).to_parquet(tmp_path / "set" / "train.parquet")
    write_manifest(read_samples(tmp_path / "set"), tmp_path / "m.jsonl")
    assert json.loads((tmp_path / "m.jsonl").read_text(encoding="utf-8")) == {
        "name": "000001",
        "references": ["m/000001-1.png", "m/000001-2.jpg"],
        "prompt": "kätzchen",
        "image": "m/000001-image.jpg",
    }
    assert read(tmp_path / "m.jsonl") == read(tmp_path / "set")
    write_manifest(read_samples(tmp_path / "set"), tmp_path / "m.jsonl")  # what is there already is as it should be
    (tmp_path / "m" / "000001-image.jpg").write_bytes(b"mine")
    with pytest.raises(ManifestError, match="000001-image.jpg is there already and would be overwritten"):
        write_manifest(read_samples(tmp_path / "set"), tmp_path / "m.jsonl")
    assert (tmp_path / "m" / "000001-image.jpg").read_bytes() == b"mine"
    row = {field: values * 2 for field, values in row.items()} | {"name": ["one", "One"]}
    twice = datasets.Dataset.from_dict(row, datasets.Features(features | {"name": text}))
    twice.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ManifestError, match="The samples 1 and 2 are named 'one' and 'One', which is one file"):
        write_manifest(read_samples(tmp_path / "set"), tmp_path / "twice.jsonl")
    assert not (tmp_path / "twice.jsonl").exists()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("m.json", "name a .jsonl file"),
        ("gone/m.jsonl", "name a file in a folder that exists"),
        ("source.jsonl", "source.jsonl is there and would be overwritten: name another file, or remove it first."),
    ],
)
def test_a_manifest_is_refused_in_one_sentence(output, said, tmp_path, monkeypatch, capsys):
    draw(tmp_path, "a.png")
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps({"references": ["a.png"], "prompt": "a"}))
    code, out, err = run(monkeypatch, capsys, "manifest", source, "--output", tmp_path / output)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_manifest_through_a_link_names_the_same_pictures(tmp_path):
    """`..` behind a link leads to where the link points, and not to where it stands."""
    (tmp_path / "mnt" / "deep").mkdir(parents=True)
    (tmp_path / "home" / "pairs").mkdir(parents=True)
    (tmp_path / "home" / "data").symlink_to(tmp_path / "mnt" / "deep")
    draw(tmp_path / "home" / "pairs", "a.png")
    (tmp_path / "home" / "pairs" / "m.jsonl").write_text(json.dumps({"references": ["a.png"], "prompt": "a"}))
    write_manifest(
        read_samples(tmp_path / "home" / "pairs" / "m.jsonl", needs_image=False), tmp_path / "home" / "data" / "m.jsonl"
    )
    (sample,) = read_samples(tmp_path / "home" / "data" / "m.jsonl", needs_image=False)
    assert sample.open_references()[0].size == open_picture(tmp_path / "home" / "pairs" / "a.png").size


def test_pictures_of_a_data_set_do_not_go_into_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "cats").mkdir()
    for output in (tmp_path / "cats.jsonl", tmp_path / "cats" / "m.jsonl"):
        code, out, err = run(monkeypatch, capsys, "manifest", tmp_path / "cats", "--output", output)
        assert (code, out) == (2, "") and "which is the source: name another file." in err


# Archives -------------------------------------------------------------------------------------------------------------


def test_a_picture_inside_an_archive_is_named_where_it_is_wrong(tmp_path):
    write_tar(tmp_path / "s.tar", {"good.png": png(0), "bad.png": b"no picture", "mask.png": png(1)})
    rows = [
        {"references": ["s.tar/bad.png"], "prompt": ""},
        {"references": ["s.tar/gone.png"], "prompt": ""},
        {"references": ["s.tar\\good.png"], "prompt": "", "reference_masks": ["s.tar/mask.png"]},
        {"references": ["gone.tar/x.png"], "prompt": ""},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second, fourth = check_samples(tmp_path / "m.jsonl", needs_image=False)
    assert f"line 1: {str(tmp_path / 's.tar/bad.png')!r} is not a picture" in first
    assert second == (
        f"line 2: {str(tmp_path / 's.tar/gone.png')!r} does not exist; check the name, and what the archive holds."
    )
    assert "line 4: " in fourth and "gone.tar" in fourth
    good = read_samples(tmp_path / "m.jsonl", needs_image=False)[2]
    assert np.array_equal(good.open_references()[0], picture(96, 64, seed=0))


def test_an_archive_of_odd_names_or_of_a_huge_text_ends_in_one_sentence(tmp_path):
    draw(tmp_path, "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for kind in ("start", "end"):
            archive.write(tmp_path / "a.png", f"é_{kind}.png")
        archive.writestr("é.txt", bytes(2**24 + 1))
    assert "é.txt' has 16777217 bytes, and at most 16777216 are read; leave it out." in problems(tmp_path / "a.zip")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace("é".encode(), b"\xff\xfe"))
    assert "cannot be read ('utf-8' codec can't decode byte 0xff" in problems(tmp_path / "a.zip")


def test_an_archive_that_changes_is_read_anew(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.png": png(0)})
    member = Member(str(tmp_path / "s.tar"), "a.png")
    assert member.read() == png(0)
    write_tar(tmp_path / "s.tar", {"longer.png": png(3), "a.png": png(1)})
    assert member.read() == png(1)
