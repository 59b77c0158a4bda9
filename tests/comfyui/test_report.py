"""The report of a run."""

import numpy as np
import pytest
from sparse_context_nodes.card import card
from sparse_context_nodes.report import Forward, Run

from sparse_context import SparseContextConfig, select_tokens
from sparse_context.bench.flops import forward_flops
from sparse_context.families.flux2.bench import SHAPES
from sparse_context.families.shape import Tokens

WHOLE, KEPT = 4 * 4096, 4 * 819


def selection():
    return select_tokens([None], [(8, 8)], SparseContextConfig(keep=0.25, selector="uniform"))


@pytest.mark.parametrize("name", ["klein-4b", "klein-9b"])
def test_the_speed_up_is_that_of_the_benchmark(name):
    """Within 3 %: the report counts what all kinds of model have in common, at the width that it sees."""
    shape, run = SHAPES[name], Run()
    run.add(Forward(shape.width, 512, 4096, WHOLE, KEPT, False), selection())
    counted = forward_flops(shape, Tokens(512, 4096, WHOLE)) / forward_flops(shape, Tokens(512, 4096, KEPT))
    assert run.speedup == pytest.approx(counted, rel=0.03)


def test_with_keys_and_values_reused_a_step_gains_less():
    once, later = Run(), Run()
    once.add(Forward(3072, 512, 4096, WHOLE, KEPT, False), selection())
    later.add(Forward(3072, 512, 4096, WHOLE, KEPT, True), selection())
    assert once.speedup > later.speedup > 1
    # Only pairs with references are saved: (24 width + 4 whole) / (24 width + 4 kept), both with the rest
    rest = 512 + 4096
    assert later.speedup == (24 * 3072 + 4 * (rest + WHOLE)) / (24 * 3072 + 4 * (rest + KEPT))


def test_forwards_of_one_kind_are_counted_together():
    run, chosen = Run(), selection()
    for _ in range(4):
        run.add(Forward(64, 1, 2, 64, 16, False), chosen)
    assert [*run.forwards.values()] == [4]
    assert run.selections == [chosen]


def test_the_report_says_what_was_kept_and_what_went_wrong():
    run = Run()
    assert str(run) == ""
    run.add(Forward(3072, 512, 4096, 4096, 819, False), selection())
    run.problems.append("Something does not fit.")
    lines = str(run).splitlines()
    assert lines[0] == "reference 1: 16 of 64 tokens (25 %) by uniform"
    assert lines[1].startswith("total: 16 of 64 tokens (25 %), task auto, in ")
    assert lines[2] == (
        "The model's steps should be about 1.8 times faster than with all reference tokens. This is calculated, not "
        "measured, and leaves out the text encoder and the VAE."
    )
    assert lines[3] == "Something does not fit."


def test_a_card_holds_the_whole_sentence():
    """Long text makes it higher, never wider, and no word reaches its edge."""
    short, long = card("A word."), card("Several words to read. " * 20)
    assert short.width == long.width == 512
    assert long.height > 5 * short.height / 2
    edge = np.asarray(long)[:, -8:]
    assert (edge == 255).all()
    assert (np.asarray(long)[-12:] == 255).all()
    assert (np.asarray(long) < 128).any()
