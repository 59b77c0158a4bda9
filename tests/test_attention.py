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
    calls, apply = [], attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", lambda *given: calls.append(given) or apply(*given))
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
    assert torch.equal(out, attention._Attention.apply(*draw()))


def test_everything_else_goes_where_it_went_before(taken, monkeypatch):
    given = draw(queries=40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    calls = [
        lambda: scaled_dot_product_attention(*given, attn_mask=mask),
        lambda: scaled_dot_product_attention(*given, mask),
        lambda: scaled_dot_product_attention(*given, is_causal=True),
        lambda: scaled_dot_product_attention(*given, scale=0.5),
        lambda: scaled_dot_product_attention(*draw(dtype=torch.float32)),
        lambda: torch.no_grad()(scaled_dot_product_attention)(*given),
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


def test_it_ends_with_its_block(taken):
    with pytest.raises(ZeroDivisionError), MatmulAttention():
        1 / 0  # noqa: B018
    scaled_dot_product_attention(*draw())
    assert not taken
