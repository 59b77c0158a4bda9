"""The recipe's losses, and its agreement with the pipeline."""

import math

import numpy as np
import pytest
import torch
from transformers import Qwen2Tokenizer

from recipes.mini.loss import encode_text, flow_matching_loss, position_ids, tokenise
from recipes.mini.model import encode_pictures, make_tokenizer, make_vae
from recipes.mini.run_folder import to_tensor
from recipes.mini.teaching import COPYING, correspondence_loss, watched_heads
from sparse_context.pipelines.embedded import WEIGHTS, read_call_settings


def test_heads_that_look_at_the_source_lose_nothing():
    """Two output tokens, three of one reference, behind one of the text; a head whose queries find their keys."""
    keys = 40 * torch.eye(6, 8)[None]  # text, two outputs, three of the reference
    query = torch.zeros(1, 6, 8)
    query[0, 1, 5] = query[0, 2, 3] = 40.0  # the first output looks at the last token, the second at the first
    still = torch.ones(6, 8), torch.zeros(6, 8)
    right, wrong = torch.tensor([[2, 0]]), torch.tensor([[0, 2]])
    assert correspondence_loss([(query, keys)], still, right, text_tokens=1) < 1e-6
    scale = 40 * 40 / 8**0.5
    assert correspondence_loss([(query, keys)], still, wrong, text_tokens=1).item() == pytest.approx(scale, rel=1e-5)
    second_bare = torch.tensor([[2, -1]])  # it should not look at a reference, but its three other tokens are ignored
    assert correspondence_loss([(query, keys)], still, second_bare, text_tokens=1).item() == pytest.approx(
        scale - math.log(3), rel=1e-5
    )
    query[0, 2] = 40 * torch.eye(8)[0]  # at the text
    assert correspondence_loss([(query, keys)], still, second_bare, text_tokens=1) < 1e-6
    both = torch.cat([query, query]), torch.cat([keys, keys])
    unknown = torch.tensor([[2, -1], [-1, -1]])  # nothing is known of the second sample
    assert correspondence_loss([both], still, unknown, text_tokens=1) < 1e-6


def test_watched_heads_are_those_that_attend_and_are_let_go(pipe):
    def call(**settings):
        return flow_matching_loss(
            pipe.transformer,
            torch.zeros(1, 32, 128),
            torch.ones(1, 32, 4, 4),
            [torch.zeros(1, 32, 4, 6)],
            torch.Generator().manual_seed(0),
            **settings,
        )

    with torch.no_grad():
        alone = call()
        with watched_heads(pipe.transformer, COPYING) as pairs:
            assert call() == alone
        assert [(q.shape, k.shape) for q, k in pairs] == [((1, 32 + 16 + 24, 64),) * 2] * len(COPYING)
        blocks = [pipe.transformer.single_transformer_blocks[b] for b, _ in COPYING]
        assert not any(block._forward_pre_hooks for block in blocks)
        inside = []  # what the blocks' own attention makes of the same call
        norms = [norm for block in blocks for norm in (block.attn.norm_q, block.attn.norm_k)]
        hooks = [norm.register_forward_hook(lambda _, __, output: inside.append(output)) for norm in norms]
        call()
        for hook in hooks:
            hook.remove()
        seen = [tensor for pair in pairs for tensor in pair]
        heads = [head for _, head in COPYING for _ in range(2)]
        for watched, made, head in zip(seen, inside, heads, strict=True):
            assert torch.allclose(watched, made[:, :, head], atol=1e-5)
        source = torch.arange(16)[None]
        ids = torch.cat(
            [torch.tensor([[0, 0, 0, i] for i in range(32)]), position_ids(4, 4, 0), position_ids(4, 6, 10)]
        )
        taught = correspondence_loss(pairs, pipe.transformer.pos_embed(ids), source, 32)
        assert call(source=source, teach=0.5).item() == pytest.approx((alone + 0.5 * taught).item(), rel=1e-6)
        assert call(source=torch.full((1, 16), -1), teach=0.5) == alone


def test_the_tokenizer_keeps_its_ids_when_reloaded(tmp_path):
    tokenizer = make_tokenizer(["Make the background plain red."] * 3, vocabulary=300)
    tokenizer.save_pretrained(tmp_path)
    again = Qwen2Tokenizer.from_pretrained(tmp_path)
    for text in ("Make the background red.", "ein Kätzchen 猫", ""):
        chat = [{"role": "user", "content": text}]
        assert tokenizer(text)["input_ids"] == again(text)["input_ids"]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == again.apply_chat_template(chat, tokenize=False)


def test_the_recipe_sees_what_the_pipeline_sees(pipe):
    settings = read_call_settings(WEIGHTS)
    prompts = ["Make the background plain red.", "Turn the picture grey."]
    text, _ = pipe.encode_prompt(
        prompts,
        max_sequence_length=settings["max_sequence_length"],
        text_encoder_out_layers=settings["text_encoder_out_layers"],
    )
    with torch.no_grad():
        assert torch.allclose(encode_text(pipe.text_encoder, *tokenise(pipe.tokenizer, prompts)), text, atol=1e-5)
    pictures = to_tensor([np.full((128, 128, 3), 90, np.uint8)])
    with torch.no_grad():
        assert torch.allclose(encode_pictures(pipe.vae, pictures), pipe._encode_vae_image(pictures, None), atol=1e-5)
    ids = pipe._prepare_image_ids([torch.zeros(1, 4, 3, 5)] * 2)[0]
    assert torch.equal(ids, torch.cat([position_ids(3, 5, 10), position_ids(3, 5, 20)]))


def test_the_base_learns_at_uniform_noise_levels_moved_towards_noise(pipe):
    seen = []
    hook = pipe.transformer.time_guidance_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0] / 1000))
    with torch.no_grad():
        flow_matching_loss(
            pipe.transformer,
            torch.zeros(2000, 1, 128),
            torch.zeros(2000, 32, 1, 1),
            [],
            torch.Generator().manual_seed(0),
        )
    hook.remove()
    uniform = seen[0] / (5 - 4 * seen[0])  # the shift undone
    assert torch.allclose(uniform.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([0.1, 0.5, 0.9]), atol=0.03)


def test_one_token_is_eight_pixels():
    with torch.no_grad():
        assert encode_pictures(make_vae().eval(), torch.zeros(1, 3, 64, 40)).shape == (1, 32, 8, 5)
