"""Attention by matrix products: what it takes over, and that values and gradients are those of softmax attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_context.training import attention
from sparse_context.training.attention import MatmulAttention


def draw(queries=24, keys=40, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, tokens, 16) for tokens in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.fixture
def taken(monkeypatch):
    """The calls that went through the matrix products."""
    calls, attend = [], attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *given: calls.append(given) or attend(*given))
    return calls


def test_values_and_gradients_are_those_of_softmax_attention(taken):
    given = draw()
    gradient = torch.randn(3, 2, 24, 16, generator=torch.Generator().manual_seed(1))
    with MatmulAttention():
        out = scaled_dot_product_attention(*given)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    true = scaled_dot_product_attention(*exact)
    assert len(taken) == 1 and out.dtype == torch.bfloat16
    assert (out - true).abs().max() < 0.01
    found = torch.autograd.grad(out, given, gradient.bfloat16())
    wanted = torch.autograd.grad(true, exact, gradient.bfloat16().double())
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 0.03 * other.abs().max()


def test_heads_that_lie_apart_in_memory_are_taken_too(taken):
    query, key, value = (tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in draw())
    with MatmulAttention():
        out = scaled_dot_product_attention(
            query=query.transpose(1, 2),
            key=key.transpose(1, 2),
            value=value.transpose(1, 2),
            attn_mask=None,
            dropout_p=0.0,
        )
    assert len(taken) == 1
    assert torch.equal(out, attention.attend(*draw()))


def test_everything_else_goes_where_it_went_before(taken, monkeypatch):
    given = draw(queries=40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    calls = [
        lambda: scaled_dot_product_attention(*given, attn_mask=mask),
        lambda: scaled_dot_product_attention(*given, mask),
        lambda: scaled_dot_product_attention(*given, is_causal=True),
        lambda: scaled_dot_product_attention(*given, scale=0.5),
        lambda: scaled_dot_product_attention(*draw(dtype=torch.float32)),
    ]
    for call in calls:
        before = call()
        with MatmulAttention():
            assert torch.equal(call(), before)
    monkeypatch.setattr(attention, "LARGEST", 2 * 3 * 2 * 40 * 40 - 1)
    with MatmulAttention():
        scaled_dot_product_attention(*given)
    assert not taken
    monkeypatch.setattr(attention, "LARGEST", 2 * 3 * 2 * 40 * 40)
    with MatmulAttention():
        scaled_dot_product_attention(*given)
    assert len(taken) == 1


def test_without_gradients_the_weights_of_one_sample_are_held(taken, monkeypatch):
    given = draw()
    monkeypatch.setattr(attention, "LARGEST", 2 * 2 * 24 * 40)
    with MatmulAttention():
        kept = scaled_dot_product_attention(*given)
        with torch.no_grad():
            out = scaled_dot_product_attention(*given)
    assert len(taken) == 1 and not out.requires_grad  # with gradients three samples are too many
    assert torch.equal(out, attention.attend(*given).detach()) and (out - kept).abs().max() < 0.02
    assert [attention._attend(*given, keep)[1].shape[0] for keep in (True, False)] == [3, 1]


def test_the_operators_are_what_torch_needs_of_them():
    given = [tensor.contiguous() for tensor in draw()]
    for keep in (True, False):
        torch.library.opcheck(attention._attend, (*(tensor.detach() for tensor in given), keep))
    weights = attention._attend(*given, True)[1]
    backward = (given[0], *given, weights)
    torch.library.opcheck(attention._attend_backward, tuple(tensor.detach() for tensor in backward))


def test_it_ends_with_its_block(taken):
    with pytest.raises(ZeroDivisionError), MatmulAttention():
        1 / 0  # noqa: B018
    scaled_dot_product_attention(*draw())
    assert not taken
