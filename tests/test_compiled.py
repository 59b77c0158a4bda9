"""Compiled blocks: within training alone, on each module's own weights, for all numbers of tokens."""

import copy

import pytest
import torch
from test_finetune import SMALL, batches, everything, klein, parts, randomise
from torch._dynamo.utils import counters

from sparse_context.training import attention
from sparse_context.training.attention import MatmulAttention
from sparse_context.training.compiled import compiled_blocks
from sparse_context.training.config import TrainConfig
from sparse_context.training.finetune import Run, finetune
from sparse_context.training.loss import flow_matching_loss
from sparse_context.training.trainable import prepare

pytestmark = [  # of torch's compiler, by itself
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


@pytest.fixture(autouse=True)
def afresh():
    """Nothing was compiled before, and nothing of it stays."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """Graphs are made as for kernels, and then run as they are: exact, and there at once."""
    run = torch._dynamo.lookup_backend("eager")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: run)


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def adapted(**settings):
    """A host with an adapter that says something."""
    host = klein()
    prepare(host, TrainConfig(**SMALL | settings))
    randomise(host.transformer)
    return host


def gradients(host, index, narrow=True):
    """The loss of a set of tokens, and the gradients of what is trained."""
    encoded, sigma, noise = parts(host, count=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        loss = flow_matching_loss(host, encoded, index, sigma, noise)
    loss.backward()
    trained = [weight for weight in host.transformer.parameters() if weight.requires_grad]
    found = torch.cat([weight.grad.flatten() for weight in trained])
    for weight in trained:
        weight.grad = None
    return torch.cat([loss.detach()[None], found])


def sets(host):
    """Several numbers of reference tokens."""
    tokens = everything(parts(host)[0])
    return [tokens[::5], tokens[::2], tokens[:50]]


def test_blocks_are_compiled_in_training_alone_and_a_copy_runs_its_own_weights():
    host = klein()
    block = host.transformer.single_transformer_blocks[0].train()
    width = block.attn.query_dim
    still, rotary = torch.ones(1, 3, width), (torch.ones(3, block.attn.head_dim), torch.zeros(3, block.attn.head_dim))

    def run(of):
        with torch.no_grad():
            return of(
                hidden_states=still,
                encoder_hidden_states=None,
                temb_mod=torch.ones(1, 3 * width),
                image_rotary_emb=rotary,
            )

    alone = run(block)
    with torch.compiler.set_stance("force_eager"), compiled_blocks(host.transformer):
        other = copy.deepcopy(block)
        other.attn.to_out.weight.data.zero_()
        assert torch.equal(run(block), alone) and torch.equal(run(other), still)
    assert "forward" not in vars(block) and torch.equal(run(block), alone)
    assert torch.equal(run(other), still)


@pytest.mark.parametrize("narrow", [False, True])
def test_one_graph_serves_all_numbers_of_tokens_and_computes_what_the_blocks_do(narrow, traced):
    host = adapted()
    given = sets(host)
    with MatmulAttention():
        plain = [gradients(host, index, narrow) for index in given]
    state = torch.get_rng_state()
    with compiled_blocks(host.transformer):
        found = [gradients(host, given[0], narrow)]
        made = graphs()
        found += [gradients(host, index, narrow) for index in given[1:]]
        assert 0 < made == graphs()
        host.transformer.eval()
        gradients(host, given[0][::2], narrow)
        assert graphs() == made
    assert all(map(torch.equal, found, plain))
    assert torch.equal(torch.get_rng_state(), state)


def test_where_attention_takes_too_much_memory_another_graph_leaves_it_as_it_is(traced, monkeypatch):
    host = adapted()
    few, many, _ = sets(host)
    total = 12 + 64 + len(few)
    heads = host.transformer.config.num_attention_heads
    monkeypatch.setattr(attention, "LARGEST", 2 * 2 * heads * total**2)
    plain = gradients(host, many)
    with MatmulAttention():
        small = gradients(host, few)
        assert torch.equal(gradients(host, many), plain)
    with compiled_blocks(host.transformer):
        assert torch.equal(gradients(host, few), small)
        made = graphs()
        assert torch.equal(gradients(host, many), plain) and graphs() > made


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"kv": True}, {"distillation": 0.5}])
def test_compiled_steps_learn_the_same(settings, traced, tmp_path):
    """Of a run in float32, where nothing but the graphs is in the way; for KV mode a graph may break."""
    weights = []
    for compiled in (False, True):
        host = klein(settings.get("kv", False))
        config = TrainConfig(compile=compiled, **SMALL | settings)
        finetune(host, batches, Run(tmp_path / str(compiled), "tiny", "x"), config)
        weights.append([weight.clone() for weight in host.transformer.parameters() if weight.requires_grad])
    assert counters["stats"]["unique_graphs"] > 0
    assert all(map(torch.equal, *weights))


def test_a_run_without_a_compiler_is_one_sentence(tmp_path):
    config = TrainConfig(compile=True, **SMALL)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler, and none was found: install one"),
    ):
        finetune(klein(), batches, Run(tmp_path, "tiny", "x"), config)


@pytest.mark.slow
def test_kernels_compute_what_the_blocks_do(monkeypatch):
    host = adapted()
    monkeypatch.setattr(host.transformer, "_repeated_blocks", ["Flux2SingleTransformerBlock"])  # half of the wait
    given = sets(host)[:2]
    plain = [gradients(host, index) for index in given]
    with compiled_blocks(host.transformer):
        found = [gradients(host, index) for index in given]
    for one, other in zip(found, plain, strict=True):
        assert (one - other).norm() < 0.03 * other.norm()
        assert not torch.equal(one, other)  # else nothing was compiled
