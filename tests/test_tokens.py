import numpy as np
import pytest
import torch

from sparse_context.tokens import ReferenceTokens


@pytest.fixture(params=["batched ids", "shared ids"])
def tokens(request):
    latents = torch.arange(2 * 6 * 3, dtype=torch.float32).reshape(2, 6, 3)
    ids = torch.arange(6 * 4).reshape(6, 4)
    return ReferenceTokens(latents, ids.expand(2, 6, 4) if request.param == "batched ids" else ids)


def test_latents_and_ids_are_cut_by_one_index(tokens):
    kept = tokens.keep(np.array([0, 2, 5]))
    assert len(tokens) == 6 and len(kept) == 3
    assert torch.equal(kept.latents, tokens.latents[:, [0, 2, 5]])
    assert torch.equal(kept.ids, tokens.ids[..., [0, 2, 5], :])
    assert kept.ids.shape[-2:] == (3, 4) and kept.ids.ndim == tokens.ids.ndim


def test_keeping_all_keeps_everything_equal(tokens):
    kept = tokens.keep(torch.arange(6))
    assert torch.equal(kept.latents, tokens.latents) and torch.equal(kept.ids, tokens.ids)


def test_a_read_only_index_and_none_at_all_will_do(tokens):
    index = np.array([1, 4])
    index.flags.writeable = False
    assert torch.equal(tokens.keep(index).latents, tokens.latents[:, [1, 4]])
    assert len(tokens.keep(np.zeros(0, np.int64))) == 0


def test_gradients_reach_the_kept_latents_only():
    latents = torch.ones(1, 4, 2, requires_grad=True)
    ReferenceTokens(latents, torch.zeros(4, 3)).keep(np.array([1, 3])).latents.sum().backward()
    assert latents.grad[0, :, 0].tolist() == [0, 1, 0, 1]


def test_tokens_are_averaged_into_the_ones_they_name(tokens):
    kept = tokens.keep(np.array([1, 2, 5]), np.array([1, 1, 2, 1, -1, 5]))
    first, second, third = kept.latents.unbind(1)
    assert torch.equal(first, tokens.latents[:, [0, 1, 3]].mean(dim=1))
    assert torch.equal(second, tokens.latents[:, 2]) and torch.equal(third, tokens.latents[:, 5])
    assert torch.equal(kept.ids, tokens.ids[..., [1, 2, 5], :])
    assert torch.equal(tokens.keep(np.array([3]), np.full(6, 3)).latents[:, 0], tokens.latents.mean(dim=1))
    plain = tokens.keep(np.array([1, 2]), np.array([-1, 1, 2, -1, -1, -1]))
    assert torch.equal(plain.latents, tokens.keep(np.array([1, 2])).latents)
    assert len(tokens.keep(np.zeros(0, np.int64), np.full(6, -1))) == 0
    assert tokens.keep(np.arange(6), np.arange(6)) is tokens


def test_means_are_taken_in_float32_and_keep_the_type_and_the_gradient():
    latents = torch.tensor([[[256.0], [1.0], [1.0], [1.0]]], dtype=torch.bfloat16, requires_grad=True)
    kept = ReferenceTokens(latents, torch.zeros(4, 3)).keep(np.array([0, 2]), np.array([0, 0, 2, 0]))
    assert kept.latents.dtype == torch.bfloat16
    assert kept.latents.flatten().tolist() == [86.0, 1.0]  # 258 / 3; in bfloat16, 256 + 1 is 256
    kept.latents.float().sum().backward()
    assert torch.allclose(latents.grad.flatten().float(), torch.tensor([1 / 3, 1 / 3, 1, 1 / 3]), atol=2e-3)


@pytest.mark.parametrize(
    ("into", "message"),
    [
        (np.array([0, 0, 2]), r"have shape \(3,\) and type int64: pass int64 \(6,\)"),
        (np.zeros(6), "type float64: pass int64"),
        (np.array([0, 0, 2, 2, 2, 3]), "each of which names itself"),
        (np.array([0, 0, 2, 2, 0, 0]), "are not the kept ones"),
        (np.array([3, 0, 2, 0, 2, 2]), "are not the kept ones"),
    ],
)
def test_wrong_tokens_to_average_into_are_refused(tokens, into, message):
    with pytest.raises(ValueError, match=message):
        tokens.keep(np.array([0, 2, 3]), into)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (np.array([0, 6]), "holds 6, but the tokens are 0 to 5"),
        (np.array([-1, 2]), "holds -1, but the tokens are 0 to 5"),
        (np.array([0, 3, 2, 5]), "has 2 after 3: sort it"),
        (np.array([1, 1]), "has 1 after 1: sort it and name each token once"),
        (np.array([[0, 1]]), r"has shape \(1, 2\)"),
        (np.array([True] * 6), "type bool: pass a 1-D int64 array, such as np.flatnonzero"),
        (np.array([0.0, 1.0]), "type float64"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "is on meta: pass it on the CPU"),
    ],
)
def test_a_wrong_index_is_refused(tokens, index, message):
    with pytest.raises(ValueError, match=message):
        tokens.keep(index)


@pytest.mark.parametrize(
    ("latents", "ids"),
    [((1, 6, 3), (5, 4)), ((1, 6, 3), (1, 5, 4)), ((6, 3), (6, 4)), ((1, 6, 3), (6,))],
)
def test_latents_and_ids_that_do_not_match_are_refused(latents, ids):
    with pytest.raises(ValueError, match="do not belong together"):
        ReferenceTokens(torch.zeros(latents), torch.zeros(ids))


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (torch.int64, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.int64, torch.int64, torch.int64),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_joining_puts_others_behind_and_keeps_fractions(one, other, both, shape):
    first = ReferenceTokens(torch.zeros(2, 3, 4), torch.full((*shape, 4), 7).to(one))
    second = ReferenceTokens(torch.ones(2, 3, 4), torch.full((*shape, 4), 128.5).to(other))
    joined = first.join(second)
    assert len(joined) == 6 and joined.ids.dtype == both
    assert torch.equal(joined.latents, torch.cat([first.latents, second.latents], 1))
    assert joined.ids[..., 0].flatten()[-1] == second.ids.max() and joined.ids[..., 0].flatten()[0] == 7
