"""`sparse-context recommend` as its users meet it."""

import json

import numpy as np
import pytest

from cli.shared import pixels
from sparse_context.evaluation import recommend as search

SEARCH = ["recommend", "-m", "{model}", "--dtype", "float32", "--prompt", "the cat", "--image", "{in}/a.png"]
WAY = ["--image", "{in}/b.png", "--task", "edit", "--overview", "none", "--keep", "0.5,0.25", "--steps", "2"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Say which images to try: pass either --image and --prompt, or --data."),
        (("--image", "{in}/a.png", "--data", "m"), "pass either --image and --prompt, or --data."),
        (("--image", "{in}/a.png"), "Missing option '--prompt': say what to make of the references."),
        (("--image", "{in}/text.png", "--prompt", "a"), "text.png' is not a picture that can be read"),
        (
            ("--image", "{in}/a.png", "--prompt", "a", "--keep", "0.5,x"),
            "keep is 'x': pass ratios such as",
        ),
        (("--image", "{in}/a.png", "--prompt", "a", "--tolerance", "close"), "tolerance is 'close': write it as"),
        (("--data", "m", "--limit", "0"), "limit is 0: pass a number of scenes, 1 or more."),
    ],
)
def test_bad_input_is_one_sentence(refused, arguments, says):
    assert says in refused("recommend", *arguments)


def test_a_search_says_its_cost_and_leaves_settings_that_make_its_picture(command, tmp_path):
    code, out, err = command(*SEARCH, *WAY, "--tolerance", "psnr=0", "--output", "found")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[:2] == [
        "psnr=0: psnr at least 0, against all tokens",
        f"at most {3 + 2 * search.TURNS} calls of the model for 1 scene",
    ]
    assert lines[2].startswith("a call with all tokens takes ") and lines[2].endswith(" in all")
    assert lines[4].split()[:5] == ["edit", "none", "0.25", "32", "of"]
    assert lines[5] == "recommended: keep 0.25, task edit"
    assert "x as fast: " in lines[6] and " MiB of memory on top of the weights instead of " in lines[6]
    assert lines[7] == "wrote found/settings.json, found/sheet.png, found/recommendation.json"
    references = ("--image", "{in}/a.png", "--image", "{in}/b.png")
    code, _, err = command("generate", "--settings", "found/settings.json", "--prompt", "the cat", *references)
    assert code == 0, err
    (shown,) = (tmp_path / "found" / "shown").glob("*0.25*/scene.png")
    assert np.array_equal(pixels("out.png"), pixels(shown))


def test_what_is_stopped_says_how_to_go_on(command, monkeypatch):
    original = search.Search.downward

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search.Search, "downward", stop)
    code, _, err = command(*SEARCH, *WAY, "--tolerance", "psnr=0")
    assert code == 130 and err.endswith("\nStopped. Run the same command again to continue.\n")
    monkeypatch.setattr(search.Search, "downward", original)
    code, out, _ = command(*SEARCH, *WAY, "--tolerance", "psnr=0", "--json")
    assert code == 0 and json.loads(out)["ways"][0]["best"] is not None
