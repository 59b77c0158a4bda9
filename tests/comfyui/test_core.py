"""The patch in a real ComfyUI core, on tiny models: `core_facts.py` finds the facts, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_core import KINDS, METHODS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "COMFYUI_DIR" not in os.environ,
        reason="COMFYUI_DIR is not set: the path of a checkout of ComfyUI, whose requirements this Python has",
    ),
]

EVERY = [f"masked {kind} {method}" for kind, methods in METHODS.items() for method in methods]
EVERY += [f"{what} {kind}" for what in ("batch", "each", "overview", "spread") for kind in KINDS]


@pytest.fixture(scope="module")
def facts():
    script = Path(__file__).with_name("core_facts.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def fact(facts, request):
    """The fact that a test is marked with."""

    def find(name):
        assert "error" not in facts[name], facts[name]["error"]
        return facts[name]

    return find


@pytest.mark.parametrize("name", EVERY)
def test_dropping_is_masking(fact, name):
    found = fact(name)
    assert found["masked"] <= 1e-5 * max(1, found["size"])


@pytest.mark.parametrize("name", EVERY)
def test_wrong_position_ids_are_seen_by_that_test(fact, name):
    found = fact(name)
    assert found["wrong ids"] > 1e3 * found["masked"]
    assert found["wrong ids"] > 1e-2


@pytest.mark.parametrize("name", EVERY)
def test_dropping_changes_the_answer(fact, name):
    assert fact(name)["dense"] > 1e-2


@pytest.mark.parametrize("name", EVERY)
def test_the_model_itself_is_untouched(fact, name):
    assert fact(name)["untouched"] is True


@pytest.mark.parametrize("name", EVERY)
def test_the_model_sees_the_tokens_that_were_promised(fact, name):
    """Two references of 64 and 60 tokens. `forward` is (width, text, output, of all references, kept, reuses)."""
    found = fact(name)
    kept = [32, 7] if name.startswith("each") else [16, 15]
    assert found["kept"] == kept
    assert found["overviews"] == ([4, 6] if name.startswith(("overview", "spread")) else [0, 0])
    assert found["forward"][2:] == [64, 124, sum(kept), False]
    assert found["dropped"] == 124 - sum(kept) + sum(found["overviews"])
    assert (found["kinds"], found["times"]) == (1, 2)  # one forward a step, guided or not


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_is_bit_equal(fact, kind):
    assert fact(f"all {kind}") == {"equal": True, "kept": 124}


@pytest.mark.parametrize("kind", ["flux", "qwen_image"])
def test_latents_of_odd_sides_have_a_last_token_that_is_cut(fact, kind):
    assert fact(f"odd {kind}") == {"finite": True, "problems": [], "grid": [8, 7]}


@pytest.mark.parametrize("name", ["kv_cache", "kv_overview"])
def test_reuse_of_keys_and_values_goes_before_or_behind(fact, name):
    found = fact(name)
    assert found["orders"] == 0
    assert found["masked"] <= 1e-5
    assert min(found["dense"], found["without"]) > 1e-2
    for order in ("before", "behind"):
        (first, once), (later, twice) = found[order]
        assert (first[-1], once, later[-1], twice) == (False, 1, True, 2)
        assert first[2:5] == later[2:5] == [64, 124, 31]


def test_a_model_without_references_is_untouched_and_says_so(fact):
    found = fact("no_references")
    assert found["equal"] is True
    assert len(found["told"]) == 1
    assert found["told"][0].startswith("The model got no reference, so nothing was dropped")


def test_a_negative_prompt_without_references_is_a_forward_of_its_own(fact):
    assert fact("several_conditionings") == {"told": [], "forwards": [2]}


def test_the_wrong_number_of_pictures_leaves_the_model_as_it_is(fact):
    found = fact("wrong_number")
    assert found["equal"] is True
    assert len(found["told"]) == 1
    assert found["told"][0].startswith("You connected 2 images, but the model got 1 reference")


def test_a_second_node_takes_the_place_of_the_first(fact):
    assert fact("applied_twice") == {"equal": True, "kept": 16}


def test_it_can_be_compiled(fact):
    assert fact("compiled")["apart"] <= 1e-5
