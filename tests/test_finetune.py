"""Fine-tuning: the loss, LoRA through plain diffusers, KV mode, caches, and what a run writes."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline, Flux2Pipeline
from peft import helpers
from peft.tuners.lora.layer import LoraLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from test_training import environment
from tiny import build_flux2, call_flux2, embeds, picture

from sparse_context.families import find_host
from sparse_context.images import open_picture
from sparse_context.samples import ManifestError, Sample, read_samples
from sparse_context.sparsify import apply_sparse_context, last_selection
from sparse_context.tokens import ReferenceTokens
from sparse_context.training.batch import Encoding, encode, prepare_batch
from sparse_context.training.cache import Cache
from sparse_context.training.card import EMBEDDED, LORA_FILE, model_card
from sparse_context.training.checkpoints import start_from
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Ahead, Batches, Example, open_example
from sparse_context.training.dropping import Dropping, draw_selection
from sparse_context.training.finetune import Run, Watch, finetune
from sparse_context.training.launch import enough_memory
from sparse_context.training.lora import extract_lora, save_lora
from sparse_context.training.loss import FlowMatching, flow_matching_loss, noise_levels, without_adapter
from sparse_context.training.processes import Processes
from sparse_context.training.trainable import Trainable, prepare
from sparse_context.training.validation import draw_validation

SMALL = {"rank": 2, "lora_alpha": 2, "max_train_steps": 3, "checkpointing_steps": 10, "learning_rate": 1e-2}


def klein(kv=False):
    """A host whose text encoder reads 12 tokens of the tiny one's layers."""
    settings = {"max_sequence_length": 12, "text_encoder_out_layers": [1, 2]}
    return find_host(build_flux2(Flux2KleinPipeline, is_distilled=True), settings, kv)


def example(seed=0, sizes=((64, 64), (96, 64)), prompt="the cat of image 1"):
    references = tuple(picture(*size, seed=seed + i) for i, size in enumerate(sizes))
    return Example(prompt, references, picture(64, 64, seed + 9), (None,) * len(sizes))


def batches(number):
    return [example(2 * number), example(2 * number + 1)]


def parts(host, count=1):
    """(encoded batch, noise levels, noise) of `count` samples."""
    encoded = encode(host, prepare_batch(host, [example(i) for i in range(count)], ["x"] * count))
    generator = torch.Generator().manual_seed(0)
    return encoded, torch.tensor([0.7] * count), torch.randn(encoded.target.shape, generator=generator)


def everything(encoded):
    return np.arange(sum(latents.shape[-1] * latents.shape[-2] for latents in encoded.references))


@torch.no_grad()
def randomise(transformer):
    """Give the adapter something to say: half of a fresh LoRA is zero."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in transformer.named_parameters():
        if "lora_B" in name:
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


# The loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Flux2KleinPipeline, Flux2Pipeline])
def test_the_host_hands_over_what_the_pipeline_does(cls, monkeypatch):
    pipe = build_flux2(cls)
    host = find_host(pipe, {})
    references = [picture(96, 64), picture(64, 80, 1)]
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    call_flux2(pipe, references)
    count = 64
    latents = seen[0]["hidden_states"][:, :count]
    made = host.reference_tokens([host.encode_pictures(host.pixels(r)) for r in references])
    noisy = ReferenceTokens(latents, host.target_tokens(torch.zeros(1, 8, 8, 8)).ids)
    with torch.no_grad():
        host.velocity(noisy, torch.tensor([1.0]), {"prompt_embeds": embeds()}, made)
    hook.remove()
    mine = seen[-1]
    for name in ("hidden_states", "encoder_hidden_states", "img_ids", "txt_ids", "timestep"):
        assert torch.equal(mine[name].float(), seen[0][name].float()), name
    assert (mine["guidance"] is None) == (seen[0]["guidance"] is None)


def test_the_loss_is_that_of_the_velocity_on_the_output_tokens():
    host = klein()
    encoded, sigma, noise = parts(host)
    wanted = host.target_tokens(noise - encoded.target).latents
    noisy = host.target_tokens(0.3 * encoded.target + 0.7 * noise)
    text, references = encoded.text, host.reference_tokens(encoded.references)
    index = np.arange(0, len(references), 3)
    velocity = host.velocity(noisy, sigma, text, references.keep(index))
    assert velocity.shape == wanted.shape == (1, 64, 8) and len(references) == 64 + 96
    expected = (velocity - wanted).square().mean()
    assert torch.allclose(flow_matching_loss(host, encoded, index, sigma, noise), expected, rtol=1e-5)
    into = index[np.arange(len(references)) // 3]  # each three in the first of them
    velocity = host.velocity(noisy, sigma, text, references.keep(index, into))
    averaged = flow_matching_loss(host, encoded, index, sigma, noise, into=into)
    assert torch.allclose(averaged, (velocity - wanted).square().mean(), rtol=1e-5) and averaged != expected


def test_distillation_meets_the_dense_answer_without_the_adapter():
    host = klein()
    encoded, sigma, noise = parts(host)
    index = everything(encoded)
    prepare(host, TrainConfig(**SMALL))
    # A fresh adapter says nothing, so with all tokens it is its own teacher
    assert flow_matching_loss(host, encoded, index, sigma, noise, 1.0).item() == 0
    assert flow_matching_loss(host, encoded, index[::4], sigma, noise, 1.0).item() > 0
    randomise(host.transformer)
    loss = flow_matching_loss(host, encoded, index, sigma, noise, 1.0)
    assert loss.item() > 0
    plain, mixed = (flow_matching_loss(host, encoded, index, sigma, noise, share) for share in (0.0, 0.25))
    assert torch.allclose(mixed, 0.75 * plain + 0.25 * loss, rtol=1e-5)


def test_preservation_holds_dense_batches_to_the_base():
    host = klein()
    encoded, sigma, noise = parts(host)
    index = everything(encoded)
    prepare(host, TrainConfig(**SMALL))

    def loss(index, **settings):
        return flow_matching_loss(host, encoded, index, sigma, noise, **settings).item()

    assert loss(index, preservation=3.0) == 0  # a fresh adapter is the base
    randomise(host.transformer)
    assert loss(index, preservation=3.0, focus=2.0) == pytest.approx(3 * loss(index, distillation=1.0), rel=1e-5)


def test_the_focus_weighs_the_tokens_inside_the_mask():
    host = klein()
    encoded, sigma, noise = parts(host)
    index = everything(encoded)
    assert encoded.mask.shape == (1, 64) and (encoded.mask == 0).all()
    plain = flow_matching_loss(host, encoded, index, sigma, noise)
    assert flow_matching_loss(host, encoded, index, sigma, noise, focus=2.0).item() == plain.item()
    inside, outside = torch.zeros(1, 64), torch.ones(1, 64)
    inside[:, 10:20], outside[:, 10:20] = 1, 0
    error_inside, error_outside = (
        flow_matching_loss(host, replace(encoded, mask=mask), index, sigma, noise, focus=1e9)
        for mask in (inside, outside)
    )  # so much weight that the rest does not count
    assert error_inside != error_outside
    weighed = flow_matching_loss(host, replace(encoded, mask=inside), index, sigma, noise, focus=2.0)
    assert torch.allclose(weighed, (30 * error_inside + 54 * error_outside) / 84, rtol=1e-4)


def test_tokens_whose_source_was_dropped_count_less():
    host = klein()
    encoded, sigma, noise = parts(host)
    index = everything(encoded)[::2]
    assert encoded.source.shape == (1, 64) and (encoded.source == -1).all()

    def loss(source, unseen):
        shown = replace(encoded, source=torch.tensor([source]))
        return flow_matching_loss(host, shown, index, sigma, noise, unseen=unseen, into=into).item()

    into = None
    plain = loss([-1] * 64, 0.0)
    assert plain == flow_matching_loss(host, encoded, index, sigma, noise).item()
    assert loss([4] * 64, 0.0) == plain  # kept
    assert loss([5] * 32 + [4] * 32, 1.0) == plain
    first, last = loss([4] * 32 + [5] * 32, 0.0), loss([5] * 32 + [-1] * 32, 0.0)
    assert first != last and plain == pytest.approx((first + last) / 2, rel=1e-5)
    assert loss([5] * 32 + [4] * 32, 0.25) == pytest.approx((0.25 * first + last) / 1.25, rel=1e-5)
    into = np.where(np.arange(160) % 2, -1, np.arange(160))
    into[5] = 4  # a part of its mean
    assert loss([5] * 32 + [4] * 32, 0.25) == loss([-1] * 64, 0.25) != loss([7] * 32 + [4] * 32, 0.25)


def test_sources_are_encoded_for_each_output_token():
    host = klein()
    shown = np.arange(64).reshape(8, 8)
    given = [replace(example(0), source=shown), example(0)]
    encoded = encode(host, prepare_batch(host, given, ["a", "b"]))
    assert encoded.source.tolist() == [list(range(64)), [-1] * 64]
    with pytest.raises(ValueError, match=r"sources of a sample are \(4, 16\) tokens, and its output has \(8, 8\)"):
        prepare_batch(host, [replace(example(0), source=shown.reshape(4, 16))], ["a"])


def test_masks_are_encoded_as_the_share_of_each_output_token():
    host = klein()
    plain = example(0)
    mask = np.zeros((64, 64), np.uint8)
    mask[:8, :4], mask[8:16] = 255, 255
    encoded = encode(host, prepare_batch(host, [replace(plain, mask=Image.fromarray(mask)), plain], ["a", "b"]))
    share = encoded.mask[0].reshape(8, 8)
    assert torch.allclose(share[0], torch.tensor([0.5] + [0.0] * 7))
    assert (share[1] == 1).all() and (share[2:] == 0).all()
    assert (encoded.mask[1] == 0).all()


def test_noise_levels():
    u = torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(noise_levels(u, "none", 1.0), u)
    assert torch.allclose(noise_levels(u, "none", 3.0), 3 * u / (1 + 2 * u))
    assert torch.allclose(noise_levels(u, "logit_normal", 1.0)[1], torch.tensor(0.5))
    normal = torch.randn(4000, generator=torch.Generator().manual_seed(0)).sigmoid().sort().values
    mine = noise_levels((torch.arange(4000) + 0.5) / 4000, "logit_normal", 1.0)
    assert (normal - mine).abs().max() < 0.03


def test_caption_dropout_empties_that_share():
    host = klein()
    seen = []
    encode_text = host.encode_text
    host.encode_text = lambda prompts, pictures: (seen.extend(prompts), encode_text(prompts, pictures))[1]
    config = TrainConfig(caption_dropout=0.3, **SMALL)
    prepare(host, config)
    loss = FlowMatching(host, batches, config)
    with torch.no_grad():
        for number in range(60):
            loss(number)
    assert abs(seen.count("") / 120 - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 120)


def test_the_subsets_of_a_batch_differ_in_their_tokens_alone_and_encoders_and_teacher_run_once():
    host = klein()
    config = TrainConfig(subsets=3, distillation=1.0, dropping=Dropping(mix={"random": 1.0}, dense=0.0), **SMALL)
    prepare(host, config)
    randomise(host.transformer)
    calls, velocity, encode_text = [], host.velocity, host.encode_text
    host.encode_text = lambda *given: (calls.append("text"), encode_text(*given))[1]
    host.velocity = lambda noisy, sigma, text, references, teacher=False: (
        calls.append(("teacher" if teacher else "student", noisy.latents, sigma, references.latents)),
        velocity(noisy, sigma, text, references, teacher),
    )[1]
    loss = FlowMatching(host, batches, config)
    values = [loss(number).item() for number in range(6)]
    assert [call if call == "text" else call[0] for call in calls] == ["text", "teacher", *["student"] * 3] * 2
    (_, noisy, sigma, _), *students = calls[1:5]
    assert all(torch.equal(call[1], noisy) and torch.equal(call[2], sigma) for call in students)
    assert len({call[3].numpy().tobytes() for call in students}) == 3
    assert len(set(values)) == 6
    assert loss(4).item() == values[4]
    assert FlowMatching(host, batches, config)(5).item() == values[5]  # resumed in the middle of a batch
    once = FlowMatching(host, batches, replace(config, subsets=1))
    assert [once(number).item() for number in (0, 1)] == [values[0], values[3]]
    pictures = prepare_batch(host, batches(0), ["x", "x"])
    first = draw_selection(config.dropping, pictures.pictures, pictures.grids(host.token), [config.seed, 3, 0, 0])
    assert torch.equal(calls[2][3], host.reference_tokens(encode(host, pictures).references).keep(first.index).latents)


def test_the_loss_of_a_run_is_that_of_its_settings():
    host = klein()
    shown = [replace(example(0), source=np.arange(64).reshape(8, 8), mask=Image.new("L", (64, 64), 255))]
    config = TrainConfig(dropping=Dropping(mix={"random": 1.0}, dense=0.0, keep_max=0.5), **SMALL)
    prepare(host, config)
    randomise(host.transformer)

    def loss(**changes):
        return FlowMatching(host, lambda number: shown, replace(config, **changes))(0).item()

    half, unseen = loss(distillation=0.5), loss(unseen=0.5)
    assert len({loss(), half, unseen}) == 3 and loss(focus=2.0) == pytest.approx(loss(), rel=1e-5)
    assert loss(preservation=9.0) == loss()
    config = replace(config, dropping=Dropping(dense=1.0))
    assert loss(preservation=9.0) == pytest.approx(9 * loss(distillation=1.0), rel=1e-5)
    assert loss(unseen=0.5) == loss()


def test_a_step_takes_all_subsets_of_its_batches(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sparse_context.training.finetune.FlowMatching",
        lambda *given, **settings: lambda number: (seen.append(number), loss())[1],
    )
    host = klein()
    loss = lambda: next(p for p in host.transformer.parameters() if p.requires_grad).sum()  # noqa: E731
    finetune(host, batches, Run(tmp_path, "tiny", "x"), TrainConfig(subsets=3, gradient_accumulation_steps=2, **SMALL))
    assert seen == list(range(3 * 2 * 3))


def test_processes_and_steps_draw_differently_and_together_as_one_process_alone():
    def losses(rank, count, numbers):
        host, config = klein(), TrainConfig(**SMALL)
        prepare(host, config)
        processes = Processes(SimpleNamespace(is_main_process=rank == 0, num_processes=count, process_index=rank))
        loss = FlowMatching(host, lambda number: batches(0), config, processes=processes)
        return [loss(number).item() for number in numbers]

    one, other = (losses(rank, 2, (0, 1, 0)) for rank in (0, 1))
    assert one[0] == one[2] and other[0] == other[2]
    assert losses(0, 1, range(4)) == [one[0], other[0], one[1], other[1]]
    assert len({*one, *other}) == 4


def test_a_strip_that_is_too_long_is_told_by_its_sample(tmp_path):
    Image.new("RGB", (1000, 30_000)).save(tmp_path / "strip.png")
    picture(64, 64).save(tmp_path / "a.png")
    sample = Sample("page 7", "x", (tmp_path / "a.png",), tmp_path / "strip.png")
    with pytest.raises(ManifestError, match="^The sample page 7 cannot be used: A reference has 1000x30000 pixels"):
        open_example(sample, 512, 512)


def test_memory_of_the_machine_that_runs_out_is_one_sentence():
    with pytest.raises(ValueError, match="^The device's memory ran out: set gradient_checkpointing=true"):
        with enough_memory():
            torch.empty(10**15)
    with pytest.raises(RuntimeError, match="^something else$"):
        with enough_memory():
            raise RuntimeError("something else")


# KV mode ---------------------------------------------------------------------------------------------------------


def test_kv_training_computes_what_the_kv_pipeline_does():
    """The forward in extract mode equals step 0 of `Flux2KleinKVPipeline`, and also its later, cached steps."""
    pipe = build_flux2(Flux2KleinKVPipeline)
    references = [picture(96, 64), picture(64, 80, 1)]
    seen, answers = [], []
    transformer = pipe.transformer
    hooks = [
        transformer.register_forward_pre_hook(lambda m, a, k: seen.append(dict(k)), with_kwargs=True),
        transformer.register_forward_hook(lambda m, a, k, out: answers.append(out[0]), with_kwargs=True),
    ]
    apply_sparse_context(pipe, keep=0.3, selector="edges")
    with torch.no_grad():
        call_flux2(pipe, references)
    index = last_selection(pipe).index
    for hook in hooks:
        hook.remove()
    assert [k["kv_cache_mode"] for k in seen] == ["extract", "cached"]

    host = find_host(build_flux2(Flux2KleinPipeline, is_distilled=True), {}, kv=True)
    made = host.reference_tokens([host.encode_pictures(host.pixels(r)) for r in references]).keep(index)
    ids = host.target_tokens(torch.zeros(1, 8, 8, 8)).ids
    for call, answer in zip(seen, answers, strict=True):
        noisy = ReferenceTokens(call["hidden_states"][:, -64:], ids)
        with torch.no_grad():
            velocity = host.velocity(noisy, call["timestep"], {"prompt_embeds": embeds()}, made)
        assert torch.allclose(velocity, answer, atol=1e-5)
        with torch.no_grad():
            plain = host.velocity(noisy, call["timestep"], {"prompt_embeds": embeds()}, made, teacher=True)
        assert not torch.allclose(plain, answer, atol=1e-3)  # full attention is another function


@pytest.mark.parametrize("kv", [False, True])
def test_a_model_that_was_published_for_kv_mode_is_its_own_teacher(kv):
    host = find_host(build_flux2(Flux2KleinKVPipeline), {}, kv)
    noisy = host.target_tokens(torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    references = host.reference_tokens([host.encode_pictures(host.pixels(picture(96, 64)))])
    text, sigma = {"prompt_embeds": embeds()}, torch.full((1,), 0.5)
    with torch.no_grad():
        student = host.velocity(noisy, sigma, text, references)
        assert torch.equal(host.velocity(noisy, sigma, text, references, teacher=True), student)


def test_kv_training_puts_references_first_and_has_finite_gradients_with_and_without_checkpointing():
    grads = []
    for checkpointing in (False, True):
        host = klein(kv=True)
        encoded, sigma, noise = parts(host)
        trained = prepare(host, TrainConfig(kv=True, gradient_checkpointing=checkpointing, **SMALL))
        randomise(host.transformer)
        seen = []
        hook = host.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)  # noqa: B023
        flow_matching_loss(host, encoded, everything(encoded), sigma, noise).backward()
        hook.remove()
        assert seen[0]["num_ref_tokens"] == 160 and seen[0]["kv_cache_mode"] == "extract"
        assert seen[0]["img_ids"][0, :160, 0].min() == 10 and seen[0]["img_ids"][0, 160:, 0].max() == 0
        grads.append([p.grad for p in trained.parameters()])
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_kv_mode_is_refused_where_no_pipeline_runs_it():
    with pytest.raises(ValueError, match="FLUX.2 dev has no pipeline"):
        find_host(build_flux2(Flux2Pipeline), {}, kv=True)


# What is trained --------------------------------------------------------------------------------------------------


def test_lora_sits_on_attention_and_fused_layers_alone_and_is_float32():
    host = klein()
    host.pipe.to(torch.bfloat16)
    trained = prepare(host, TrainConfig(**SMALL))
    names = {name.split("/lora_")[0].replace("/", ".") for name, _ in trained.named_parameters()}
    double, single = "transformer_blocks.{}.attn.{}", "single_transformer_blocks.{}.attn.{}"
    assert names == {double.format(i, n) for i in (0, 1) for n in ("to_q", "to_k", "to_v", "to_out.0")} | {
        single.format(i, n) for i in (0, 1) for n in ("to_qkv_mlp_proj", "to_out")
    }
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert sum(p.requires_grad for p in host.transformer.parameters()) == len(list(trained.parameters()))


@pytest.mark.parametrize("layers", [("to_z",), ("to_q", "to_z"), ("to_q", "")])
def test_unknown_layers_are_named_also_beside_known_ones(layers):
    with pytest.raises(ValueError, match=f"takes no LoRA there .it has no '{layers[-1]}'"):
        prepare(klein(), TrainConfig(lora_layers=layers))


def test_a_rank_that_no_layer_can_have_is_refused_before_it_takes_the_memory():
    """Width 32: no matrix of the tiny model has a higher rank."""
    prepare(klein(), TrainConfig(rank=32))
    with pytest.raises(ValueError, match="rank is 33, and no layer that gets a LoRA has a rank above 32"):
        prepare(klein(), TrainConfig(rank=33))
    prepare(klein(), TrainConfig(rank=10**12, full=True))  # has no LoRA


@pytest.mark.parametrize("kv", [False, True])
def test_a_lora_of_a_run_gives_equal_outputs_in_plain_diffusers(kv, tmp_path):
    """For KV mode in the pipeline that has it, dense and with dropped tokens."""
    host = klein(kv)
    config = TrainConfig(kv=kv, **SMALL | {"lora_alpha": 6})
    result = finetune(host, batches, Run(tmp_path / "run", "tiny", "pictures"), config)
    references = [picture(64, 64), picture(96, 64)]
    host.transformer.eval()
    if kv:
        trained, fresh = Flux2KleinKVPipeline(**host.pipe.components), build_flux2(Flux2KleinKVPipeline)
    else:
        trained, fresh = host.pipe, build_flux2(Flux2KleinPipeline, is_distilled=True)
    mine = call_flux2(trained, references)
    before = call_flux2(fresh, references)
    fresh.load_lora_weights(str(result.parent), weight_name=result.name, use_safetensors=True)
    assert torch.equal(call_flux2(fresh, references), mine)
    assert not torch.allclose(before, mine, atol=1e-3)
    with without_adapter(host.transformer):
        assert torch.equal(call_flux2(trained, references), before)
    for pipe in (trained, fresh):
        apply_sparse_context(pipe, keep=0.2)
    assert torch.equal(call_flux2(fresh, references), call_flux2(trained, references))
    assert last_selection(fresh).kept == 32

    with safe_open(result, framework="pt") as file:
        about = json.loads(file.metadata()["sparse_context"])
    assert about["base"] == "tiny" and about["steps"] == 3 and about["keep"] == [0.05, 1.0]
    assert about["merge"] == [0.0]
    assert about["mix"] == Dropping().mix and about["kv"] is kv
    card = (result.parent / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card and 'base_model: "tiny"' in card
    assert not list(result.parent.glob("*.partial"))
    for file in (result, *result.parent.glob("step-*/*")):  # for all who may read the folder
        assert file.stat().st_mode & 0o777 == result.parent.stat().st_mode & 0o666


@pytest.mark.skipif(os.name == "nt", reason="no such limit there")
@pytest.mark.parametrize("full", [False, True])
def test_a_disk_that_fills_up_at_the_result_leaves_none_and_the_run_ends_later(full, tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk, from the moment on in which the result is written."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_up(owner, name):
        save = getattr(owner, name)

        def limited(*arguments, **settings):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
            try:
                return save(*arguments, **settings)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        monkeypatch.setattr(owner, name, limited)

    host = klein()
    fills_up(*((host.transformer, "save_pretrained") if full else (host.pipe, "save_lora_weights")))
    config = TrainConfig(full=full, **SMALL)
    with pytest.raises(OSError, match="could not be written .*: free some space and resume"):
        finetune(host, batches, Run(tmp_path, "tiny", "x"), config)
    name = "transformer" if full else LORA_FILE
    assert not (tmp_path / name).exists() and not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "step-0000003").is_dir()

    def never(number):
        raise AssertionError(f"batch {number} was taken again")

    result = finetune(klein(), never, Run(tmp_path, "tiny", "x", resume=True), config)
    whole = finetune(klein(), batches, Run(tmp_path / "whole", "tiny", "x"), config)
    files = (result, whole) if not full else (next(each.glob("*.safetensors")) for each in (result, whole))
    one, other = map(load_file, files)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_all_weights_have_their_record_beside_them(tmp_path):
    config = TrainConfig(full=True, **SMALL | {"max_train_steps": 1})
    result = finetune(klein(), batches, Run(tmp_path, "tiny", "x"), config)
    record = json.loads((result / "sparse_context.json").read_text())
    assert (record["base"], record["steps"], record["kv"]) == ("tiny", 1, False)
    assert record["base_weights"] == json.loads((tmp_path / "config.json").read_text())["base_weights"]


def test_all_weights_are_trained_and_loaded_back(tmp_path):
    host = klein()
    before = {name: p.clone() for name, p in host.transformer.named_parameters()}
    result = finetune(host, batches, Run(tmp_path, "tiny", "x"), TrainConfig(full=True, ema=0.5, **SMALL))
    saved = type(host.transformer).from_pretrained(result)
    average = load_file(tmp_path / "step-0000003" / "average.safetensors")
    for name, p in saved.named_parameters():
        assert torch.equal(p, average[name.replace(".", "/")])
    assert sum(not torch.equal(p, before[name]) for name, p in saved.named_parameters()) > 0.9 * len(before)


def test_a_lora_is_extracted_from_a_full_fine_tuning(tmp_path):
    base, tuned = klein().pipe, klein().pipe
    linear = {name for name, layer in base.transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in linear:
            weight = tuned.transformer.get_submodule(name).weight
            thin = [torch.randn(size, 2, generator=generator) for size in weight.shape]
            weight += 0.05 * thin[0] @ thin[1].T
    references = [picture(64, 64)]
    changed = call_flux2(tuned, references)
    assert not torch.allclose(changed, call_flux2(base, references), atol=1e-2)
    wide = extract_lora(base.transformer, tuned.transformer, 64)
    assert {name.rsplit(".", 2)[0] for name in wide} == {f"transformer.{name}" for name in linear}
    for rank in (2, 64):  # the change has two directions, so two hold it
        lora = extract_lora(base.transformer, tuned.transformer, rank)
        assert max(min(tensor.shape) for tensor in lora.values()) <= rank
        save_torch(lora, tmp_path / LORA_FILE)
        pipe = klein().pipe
        pipe.load_lora_weights(tmp_path, weight_name=LORA_FILE, use_safetensors=True)
        assert torch.allclose(call_flux2(pipe, references), changed, atol=1e-3)
    one = extract_lora(base.transformer, tuned.transformer, 1)
    for name in linear:  # the nearest of rank 1: what is left is the second singular value
        change = tuned.transformer.get_submodule(name).weight - base.transformer.get_submodule(name).weight
        made = one[f"transformer.{name}.lora_B.weight"] @ one[f"transformer.{name}.lora_A.weight"]
        left = torch.linalg.matrix_norm(change - made).item()
        assert left == pytest.approx(torch.linalg.svdvals(change)[1].item(), rel=1e-3)
    with pytest.raises(ValueError, match="rank is 0"):
        extract_lora(base.transformer, tuned.transformer, 0)
    with pytest.raises(ValueError, match="is not the same kind of layer in both models"):
        extract_lora(base.transformer, torch.nn.Linear(2, 2), 1)


def test_muon_takes_the_matrices_of_the_blocks(tmp_path):
    host = klein()
    before = {name: p.clone() for name, p in host.transformer.named_parameters()}
    config = TrainConfig(full=True, muon_learning_rate=1e-3, **SMALL | {"learning_rate": 1e-30})
    finetune(host, batches, Run(tmp_path, "tiny", "x"), config)
    moved = {name for name, p in host.transformer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in before.items() if p.ndim == 2 and "transformer_blocks." in name}


def test_muon_trains_a_lora_too(tmp_path):
    host = klein()
    config = TrainConfig(muon_learning_rate=1e-3, **SMALL)
    lora = load_file(finetune(host, batches, Run(tmp_path, "tiny", "x"), config))
    assert all(tensor.isfinite().all() for tensor in lora.values())
    assert any(tensor.any() for name, tensor in lora.items() if "lora_B" in name)  # which begin at 0


def test_the_rest_decays_as_asked_beside_muon(tmp_path):
    host = klein()
    before = host.transformer.proj_out.weight.clone()
    host.transformer.proj_out.weight.register_hook(torch.zeros_like)  # decay is all that moves it
    config = TrainConfig(
        full=True,
        muon_learning_rate=1e-3,
        adam_weight_decay=0.5,
        **SMALL | {"learning_rate": 0.1, "max_train_steps": 1, "lr_warmup_steps": 0},
    )
    finetune(host, batches, Run(tmp_path, "tiny", "x"), config)
    assert torch.allclose(host.transformer.proj_out.weight, before * (1 - 0.1 * 0.5))


def test_checkpoints_hold_the_adapter_and_not_its_base(tmp_path):
    host = klein()
    finetune(host, batches, Run(tmp_path, "tiny", "x"), TrainConfig(**SMALL))
    weights = load_file(tmp_path / "step-0000003" / "weights.safetensors")
    assert weights and all("lora_" in name for name in weights)


def test_training_lowers_the_loss():
    host = klein()
    config = TrainConfig(**SMALL)
    trained = prepare(host, config)
    loss = FlowMatching(host, lambda number: batches(0), config)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    values = []
    for _ in range(12):
        value = loss(0)
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


# A run ------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_at_equal_weights_and_keeps_its_settings(tmp_path):
    config = TrainConfig(**SMALL | {"max_train_steps": 4, "checkpointing_steps": 1, "ema": 0.5})
    whole = finetune(klein(), batches, Run(tmp_path / "whole", "tiny", "x"), config)

    def killed(number):
        if number >= 3:
            raise KeyboardInterrupt
        return batches(number)

    with pytest.raises(KeyboardInterrupt):
        finetune(klein(), killed, Run(tmp_path / "cut", "tiny", "x"), config)
    for resume, changes, message in (
        (False, {}, "holds a run at step 3: continue it with resume='latest'"),
        (True, {"seed": 1}, "seed was 0 and is now 1"),
        (True, {"lr_warmup_steps": 200, "lr_scheduler": "cosine"}, "lr_warmup_steps was 100 and is now 200"),
        (True, {"max_train_steps": 2}, "is at step 3, and max_train_steps is 2: pass at least as many"),
    ):
        other = TrainConfig(**SMALL | {"max_train_steps": 4, "checkpointing_steps": 1, "ema": 0.5} | changes)
        with pytest.raises(ValueError, match=message):
            finetune(klein(), batches, Run(tmp_path / "cut", "tiny", "x", resume=resume), other)
    other_base = klein()
    with torch.no_grad():
        other_base.transformer.proj_out.weight.mul_(2)
    with pytest.raises(ValueError, match="base_weights was '[0-9a-f]{16}' and is now"):
        finetune(other_base, batches, Run(tmp_path / "cut", "tiny", "x", resume=True), config)
    with pytest.raises(ValueError, match="samples was 2 and is now 3"):
        record = json.loads((tmp_path / "cut" / "config.json").read_text())
        (tmp_path / "cut" / "config.json").write_text(json.dumps({**record, "samples": 2}))
        finetune(klein(), batches, Run(tmp_path / "cut", "tiny", "x", {"samples": 3}, resume=True), config)
    del record["preservation"], record["dropping"]["merge"]  # as of a run begun before these were there
    (tmp_path / "cut" / "config.json").write_text(json.dumps(record))
    cut = finetune(klein(), batches, Run(tmp_path / "cut", "tiny", "x", resume=True), config)
    one, other = load_file(whole), load_file(cut)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_keeps_the_rates_of_its_steps_and_the_order_of_its_mix(tmp_path):
    def train(steps, resume=False, **changes):
        config = TrainConfig(**SMALL | {"checkpointing_steps": 1, "max_train_steps": steps} | changes)
        return finetune(klein(), batches, Run(tmp_path, "tiny", "x", resume=resume), config)

    mixed = Dropping(mix={"random": 0.5, "blobs": 0.5})
    train(2, lr_scheduler="linear", lr_warmup_steps=0, dropping=mixed)
    with pytest.raises(ValueError, match="max_train_steps was 2 and is now 4"):
        train(4, resume=True, lr_scheduler="linear", lr_warmup_steps=0, dropping=mixed)
    turned = Dropping(mix={"blobs": 0.5, "random": 0.5})
    with pytest.raises(ValueError, match="dropping was .* and is now"):
        train(2, resume=True, lr_scheduler="linear", lr_warmup_steps=0, dropping=turned)


def test_each_sample_of_a_batch_has_its_own_mask():
    masked = replace(example(0), masks=(Image.new("L", (64, 64), 255), None))
    prepared = prepare_batch(klein(), [masked, example(1)], ["a", "b"])
    assert [array.shape[-1] for array in prepared.pictures[0]] == [4, 3]
    assert [array.shape[-1] for array in prepared.pictures[1]] == [3, 3]


def test_cached_prompts_of_several_lengths_are_padded_where_a_mask_says_so(tmp_path):
    host = klein()
    lengths = {"a": 2, "b": 3}

    def encode_text(prompts, pictures):
        longest = max(lengths[prompt] for prompt in prompts)
        mask = torch.stack([torch.arange(longest) < lengths[prompt] for prompt in prompts])
        return {"prompt_embeds": mask[..., None].float().expand(-1, -1, 4).clone(), "prompt_embeds_mask": mask}

    host.encode_text = encode_text
    prepared = prepare_batch(host, batches(0), ["a", "b"])
    plain = encode(host, prepared).text
    cached = encode(host, prepared, text_cache=Cache(tmp_path / "with", host.pipe.text_encoder)).text
    assert plain.keys() == cached.keys() and all(torch.equal(plain[name], cached[name]) for name in plain)
    host.encode_text = lambda prompts, pictures: {"prompt_embeds": encode_text(prompts, pictures)["prompt_embeds"]}
    with pytest.raises(ValueError, match="several padded lengths, .*: pass train_batch_size=1"):
        encode(host, prepared, text_cache=Cache(tmp_path / "without", host.pipe.text_encoder))


LOST = {
    "gone": (None, r"config.json cannot be read \(No such file or directory\), so nothing tells"),
    "half": ('{"seed": 0', "config.json cannot be read"),
    "not UTF-8": (b"\xff\xfe{", "config.json cannot be read"),
    "of something else": ("{}", "config.json is no record of a run"),
    "a list": ("[1]", "config.json is no record of a run"),
    "next to nothing": ('{"dropping": {}}', "config.json is no record of a run"),
}


@pytest.mark.parametrize("lost", LOST)
def test_without_its_settings_no_run_goes_on(lost, tmp_path):
    config = TrainConfig(**SMALL | {"max_train_steps": 1})
    finetune(klein(), batches, Run(tmp_path, "tiny", "x"), config)
    data, message = LOST[lost]
    (tmp_path / "config.json").unlink()
    if data is not None:
        (tmp_path / "config.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    longer = TrainConfig(**SMALL | {"max_train_steps": 2})
    with pytest.raises(ValueError, match=message):
        finetune(klein(), batches, Run(tmp_path, "tiny", "x", resume=True), longer)
    assert not (tmp_path / "step-0000002").exists()


@pytest.mark.parametrize("name", ["base_weights", "data", "processes", "mixed_precision", "dropping"])
def test_a_record_that_lacks_what_each_has_is_none(name, tmp_path):
    config = TrainConfig(**SMALL | {"max_train_steps": 1})
    finetune(klein(), batches, Run(tmp_path, "tiny", "x"), config)
    record = json.loads((tmp_path / "config.json").read_text())
    del record[name]
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="config.json is no record of a run"):
        finetune(klein(), batches, Run(tmp_path, "tiny", "x", resume=True), config)


def test_a_start_that_was_written_has_no_settings_yet(tmp_path):
    config = TrainConfig(**SMALL | {"max_train_steps": 1})
    start_from(prepare(klein(), config), tmp_path)
    assert finetune(klein(), batches, Run(tmp_path, "tiny", "x", resume=True), config).is_file()


@pytest.mark.slow
def test_two_results_of_one_training_are_equal_to_the_byte(tmp_path):
    """In processes of their own, for sets have another order in each."""
    script = """
import sys
from pathlib import Path
from types import SimpleNamespace
from test_finetune import Run, TrainConfig, SMALL, batches, finetune, klein
finetune(klein(), batches, Run(Path(sys.argv[1]), "tiny", "x"), TrainConfig(**SMALL))
"""
    results = []
    for seed in "012":
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / seed)],
            check=True,
            capture_output=True,
            env=environment(PYTHONHASHSEED=seed),
        )
        results.append((tmp_path / seed / LORA_FILE).read_bytes())
    assert results[0] == results[1] == results[2]


def test_a_written_lora_is_what_was_to_be_written(tmp_path):
    tensors = {name: torch.randn(3, 2) for name in ("b", "a")}
    settings = {"transformer.r": 2, "transformer.target_modules": ["to_v", "to_q"], "transformer.ranks": [3, 1, "x"]}
    said = {"größe": '"1"\n\u0007\u2028\\', "format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    said |= {str(i): "" for i in range(9)}
    for name in ("one", "other"):
        save_lora(tensors, tmp_path / name, said)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    loaded = load_file(tmp_path / "one")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "one", framework="pt") as file:
        found = file.metadata()
    written = json.loads(found.pop("lora_adapter_metadata"))
    assert written == settings | {"transformer.target_modules": ["to_q", "to_v"]}
    assert found == {name: text for name, text in said.items() if name != "lora_adapter_metadata"}


@pytest.mark.parametrize("full", [False, True])
def test_what_is_in_the_way_of_the_result_is_told(full, tmp_path):
    config = TrainConfig(full=full, **SMALL | {"max_train_steps": 1})
    finetune(klein(), batches, Run(tmp_path, "tiny", "x"), config)
    result = tmp_path / ("transformer" if full else LORA_FILE)
    shutil.rmtree(result) if full else result.unlink()
    (tmp_path / "result.partial").touch()  # what is left of a run, which is in nobody's way
    for name in ("log.jsonl", "README.md", LORA_FILE, "transformer", "validation"):
        kept = tmp_path / "kept"
        if (tmp_path / name).exists():
            (tmp_path / name).rename(kept)
        folder = name in ("transformer", "validation")
        (tmp_path / name).touch() if folder else (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} is no {'folder' if folder else 'file'}, .*: move it away"):
            finetune(None, None, Run(tmp_path, "tiny", "x", resume=True), config)
        (tmp_path / name).unlink() if folder else (tmp_path / name).rmdir()
        if kept.exists():
            kept.rename(tmp_path / name)

    if not full:
        with pytest.MonkeyPatch.context() as patch:

            def meanwhile(record):  # it comes into the way as the result is written
                (result / "mine").mkdir(parents=True)
                return {}

            patch.setattr("sparse_context.training.export.training_record", meanwhile)
            with pytest.raises(OSError, match="could not be written .*: move what has its name away and resume"):
                finetune(klein(), batches, Run(tmp_path, "tiny", "x", resume=True), config)
        shutil.rmtree(result)
    assert finetune(klein(), batches, Run(tmp_path, "tiny", "x", resume=True), config) == result


def test_a_warm_up_may_change_once_it_is_over(tmp_path):
    def run(steps, warmup, resume=True):
        changes = {"max_train_steps": steps, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": warmup}
        config = TrainConfig(**SMALL | {"checkpointing_steps": 1} | changes)
        return finetune(klein(), batches, Run(tmp_path, "tiny", "x", resume=resume), config)

    run(2, 1, resume=False)
    with pytest.raises(ValueError, match="lr_warmup_steps was 1 and is now 5"):
        run(3, 5)
    assert run(3, 2).is_file() and (tmp_path / "step-0000003").is_dir()


def test_validation_draws_dense_beside_sparse_and_leaves_the_training_alone(tmp_path):
    config = {**SMALL, "max_train_steps": 3}
    plain = finetune(klein(), batches, Run(tmp_path / "plain", "tiny", "x"), TrainConfig(**config))
    host = klein()
    host.pipe.register_to_config(_name_or_path=str(tmp_path))
    (tmp_path / "call.json").write_text(json.dumps({"num_inference_steps": 2, **host.settings}))
    shown = finetune(
        host,
        batches,
        Run(tmp_path / "shown", "tiny", "x"),
        TrainConfig(**config, validation_steps=2),
        watch=Watch(validation=[example()]),
    )
    sheets = sorted((tmp_path / "shown" / "validation").iterdir())
    assert [s.name for s in sheets] == ["step-0000002.webp", "step-0000003.webp"]  # and after the last
    assert open_picture(sheets[0]).width == 64 + 96 + 3 * 64 + 4 * 8
    one, other = load_file(plain), load_file(shown)
    assert all(torch.equal(one[name], other[name]) for name in one)


# Under autocast torch says once that RMS norm, whose weights stay float32, is not fused
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_validation_runs_with_float32_weights_beside_a_narrow_text_encoder(tmp_path):
    host = klein()
    host.pipe.text_encoder.to(torch.bfloat16)
    host.pipe.register_to_config(_name_or_path=str(tmp_path))
    (tmp_path / "call.json").write_text(json.dumps({"num_inference_steps": 1, **host.settings}))
    config = TrainConfig(full=True, validation_steps=1, **SMALL | {"max_train_steps": 1})
    finetune(host, batches, Run(tmp_path / "run", "tiny", "x"), config, watch=Watch(validation=[example()]))
    assert (tmp_path / "run" / "validation" / "step-0000001.webp").is_file()


def test_no_run_ends_by_its_validation_pictures(tmp_path, capsys):
    host = klein()
    host.pipe.register_to_config(_name_or_path=str(tmp_path))
    (tmp_path / "call.json").write_text(json.dumps({"max_references": 1, **host.settings}))
    config = TrainConfig(validation_steps=1, **SMALL | {"max_train_steps": 2})
    result = finetune(host, batches, Run(tmp_path / "run", "tiny", "x"), config, watch=Watch(validation=[example()]))
    assert result.is_file() and not list((tmp_path / "run").glob("validation/*"))
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split(":")[0] for line in said] == [f"No validation pictures at step {step}" for step in (1, 2)]
    assert "There are 2 references" in said[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "mine"),
        (LORA_FILE, "mine"),
        ("transformer/x", "mine"),
        ("config.json", "{}"),
        ("config.json", "x"),
        ("log.jsonl", "mine"),
        ("validation/x", "mine"),
        ("step-1.partial/x", "mine"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_files_of_somebody_else_is_left_alone(tmp_path, name, text, resume):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]} and no checkpoint|config.json cannot be read"):
        finetune(klein(), batches, Run(tmp_path, "tiny", "x", resume=resume), TrainConfig(**SMALL))
    assert file.read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_a_validation_picture_that_the_format_does_not_hold_is_scaled_down(monkeypatch, tmp_path):
    host = klein()
    host.pipe.register_to_config(_name_or_path=str(tmp_path))
    (tmp_path / "call.json").write_text(json.dumps({"num_inference_steps": 1, **host.settings}))
    monkeypatch.setattr("sparse_context.training.validation.SHEET_SIDE", 200)
    assert max(draw_validation(host, [example()], TrainConfig(**SMALL)).size) == 200


def test_the_card_of_the_embedded_model_loads_it_and_names_no_folder_of_this_machine(tmp_path):
    record = {
        "data": str(tmp_path),
        "full": False,
        "kv": True,
        "steps": 3,
        "gradient_accumulation_steps": 1,
        "processes": 1,
        "rank": 4,
        "lora_alpha": 4,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "muon_learning_rate": 7e-4,
        "subsets": 1,
        "distillation": 0.0,
        "preservation": 0.0,
        "focus": 2.0,
        "unseen": 1.0,
        "version": "0",
        "dropping": asdict(Dropping()),
    }
    pipe = build_flux2(Flux2KleinKVPipeline)
    own = model_card({**record, "base": EMBEDDED}, pipe, pipe.transformer)
    assert "from_pretrained(WEIGHTS, " in own and "import WEIGHTS" in own and "base_model" not in own
    assert "| learning rate | 0.0001, of Muon 0.0007, constant |" in own
    assert "height=128, width=128, num_inference_steps=8, max_sequence_length=32, text_encoder_out_layers=[2]" in own
    assert "KV mode" in own and f"`{tmp_path.name}`" in own and str(tmp_path.parent) not in own
    assert "| steps | 3 |\n" in own
    several = {"gradient_accumulation_steps": 2, "processes": 4}
    assert "| steps | 3, 2 batches a step on each of 4 processes |" in model_card(
        {**record, **several, "base": EMBEDDED}, pipe, pipe.transformer
    )
    pipe.register_to_config(is_distilled=False)
    base = "black-forest-labs/FLUX.2-klein-base-4B"
    sibling = model_card({**record, "base": base}, pipe, pipe.transformer)
    assert '"black-forest-labs/FLUX.2-klein-4B", dtype=torch.bfloat16)  # the distilled sibling of the base' in sibling
    pipe.register_to_config(is_distilled=True)
    few = {**record["dropping"], "overview_factors": (2,)}
    assert "of each reference, log-uniform |" in model_card(
        {**record, "base": base, "dropping": few}, pipe, pipe.transformer
    )
    few["overview_factors"] = (2, 4)
    assert "as many below 0.15 as above |" in model_card(
        {**record, "base": base, "dropping": few}, pipe, pipe.transformer
    )
    local = model_card({**record, "base": str(tmp_path)}, pipe, pipe.transformer)
    assert f'from_pretrained("path/to/{tmp_path.name}", ' in local and str(tmp_path.parent) not in local
    hub = model_card({**record, "base": "owner/name"}, pipe, pipe.transformer)
    assert 'base_model: "owner/name"' in hub and 'from_pretrained("owner/name", ' in hub


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"max_train_steps": -1}, "max_train_steps is -1"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"subsets": 0}, "subsets is 0"),
        ({"distillation": -0.1}, "distillation is -0.1"),
        ({"unseen": 0.0}, "unseen is 0.0"),
        ({"focus": -1.0}, "focus is -1.0"),
        ({"full": True, "distillation": 0.5}, "distillation takes .* leave one of the two out"),
        ({"full": True, "preservation": 1.0}, "preservation takes .* leave one of the two out"),
        ({"preservation": -1.0}, "preservation is -1.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"muon_learning_rate": 0.0}, "muon_learning_rate is 0.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"lr_scheduler": "sine"}, "lr_scheduler is 'sine'"),
        ({"weighting_scheme": "mode"}, "weighting_scheme is 'mode'"),
        ({"validation_keep": 0.0}, "keep is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


# Data -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path):
    rows = []
    for i in range(7):
        picture(96, 64, i).save(tmp_path / f"{i}.png")
        references = [f"{i}.png"] * (1 + i % 2)
        rows.append(json.dumps({"references": references, "image": f"{i}.png", "prompt": f"p{i}"}))
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    return read_samples(tmp_path / "m.jsonl")


def test_an_epoch_has_every_sample_and_a_batch_one_number_of_references(samples):
    single = Batches(samples, 1, 0, 512, 512)
    assert len(single) == 7
    for epoch in (0, 1):
        assert sorted(int(single.indices(7 * epoch + i)[0]) for i in range(7)) == list(range(7))
    assert [int(single.indices(i)[0]) for i in range(7)] != [int(single.indices(7 + i)[0]) for i in range(7)]
    pairs = Batches(samples, 2, 0, 512, 512)
    assert len(pairs) == 4
    held = [pairs.indices(i) for i in range(4)]
    assert set(np.concatenate(held).tolist()) == set(range(7))
    assert all(len({int(i) % 2 for i in batch}) == 1 for batch in held)


def test_the_mask_of_an_image_goes_with_it(tmp_path):
    mask = np.zeros((300, 400), np.uint8)
    mask[:, :200] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for name, size in (("large", (400, 300)), ("small", (96, 64))):
        picture(*size).save(tmp_path / f"{name}.png")
    rows = [{"references": ["small.png"], "image": f"{name}.png", "prompt": ""} for name in ("small", "large")]
    rows[1]["mask"] = "mask.png"
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small, large = read_samples(tmp_path / "m.jsonl")
    assert open_example(small, 200, 200).mask is None
    shown = open_example(large, 200, 200)
    assert shown.mask.size == shown.image.size == (231, 173)
    cropped = open_example(large, 200, 200, [(96, 64), (96, 64)])
    assert cropped.mask.size == cropped.image.size == cropped.references[0].size == (96, 64)
    covered = np.asarray(cropped.mask)
    assert (covered[:, :45] == 255).all() and (covered[:, 51:] == 0).all()


def test_larger_pictures_are_scaled_down_to_the_resolution_and_no_other(tmp_path):
    for name, size in (("large", (400, 300)), ("small", (96, 64)), ("tiny", (40, 80))):
        picture(*size).save(tmp_path / f"{name}.png")
    row = {"references": ["large.png", "small.png", "tiny.png"], "image": "large.png", "prompt": ""}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    (made,) = Batches(read_samples(tmp_path / "m.jsonl"), 1, 0, 200, 100)(0)
    assert made.image.size == (231, 173) and made.mask is None  # 200 * 200 pixels, 4 : 3
    assert [r.size for r in made.references] == [(115, 87), (96, 64), (64, 128)]


def test_above_a_megapixel_outputs_keep_their_size_up_to_the_resolution_and_references_do_not(tmp_path):
    Image.new("RGB", (1500, 1000)).save(tmp_path / "large.png")
    row = {"references": ["large.png"], "image": "large.png", "prompt": ""}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    (made,) = Batches(read_samples(tmp_path / "m.jsonl"), 1, 0, 2048, 2048)(0)
    assert made.image.size == (1500, 1000)
    assert made.references[0].size == (1254, 836)  # a megapixel, as the pipelines scale it


def test_what_is_made_ahead_is_the_same():
    made = []

    def make(number):
        made.append(number)
        return [number]

    ahead = Ahead(make)
    assert [ahead(n) for n in (2, 3, 4, 1)] == [[2], [3], [4], [1]]
    assert made[:5] == [2, 3, 4, 5, 1]


def test_processes_make_ahead_what_a_thread_makes():
    """In the order asked for, from any number on, and what goes wrong there is raised here."""

    def make(number):
        if number == 9:
            raise ManifestError("the ninth is missing")
        return os.getpid(), torch.full((2,), number)

    ahead = Ahead(make, workers=2)
    found = [ahead(n) for n in (3, 4, 5, 1, 2, 8)]
    assert [int(tensor[0]) for _, tensor in found] == [3, 4, 5, 1, 2, 8]
    assert os.getpid() not in {process for process, _ in found}
    with pytest.raises(ManifestError, match="^the ninth is missing$"):
        ahead(9)


def narrow():
    return torch.autocast("cpu", torch.bfloat16)


def test_encoders_of_float32_weights_run_in_mixed_precision_where_it_is_asked_for_and_others_never():
    host = klein()
    batch = prepare_batch(host, batches(0), ["a", "b"])
    plain, mixed = encode(host, batch), encode(host, batch, autocast=narrow)
    for whole, rounded in (
        (plain.target, mixed.target),
        (plain.references[1], mixed.references[1]),
        (plain.text["prompt_embeds"], mixed.text["prompt_embeds"].float()),
    ):
        assert 0 < (rounded - whole).norm() < 0.05 * whole.norm()
    with narrow():
        assert torch.equal(mixed.target, host.encode_pictures(batch.target).float())
    for part in (host.pipe.vae, host.pipe.text_encoder):
        part.to(torch.bfloat16)
    whole, again = encode(host, batch), encode(host, batch, autocast=narrow)
    assert torch.equal(whole.target, again.target)
    assert torch.equal(whole.text["prompt_embeds"], again.text["prompt_embeds"])


def test_a_run_in_mixed_precision_encodes_in_it():
    host = klein()
    prepare(host, TrainConfig(**SMALL))
    loss = FlowMatching(host, batches, TrainConfig(**SMALL), autocast=narrow)
    wanted = encode(host, prepare_batch(host, batches(0), ["", ""]), autocast=narrow)
    assert torch.equal(loss._noised(0).encoded.target, wanted.target)


@pytest.fixture
def accelerator():
    """Mixed precision on a CPU. One process has one state of it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of norms in autocast
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_mixed_precision_an_adapter_casts_nothing_and_learns_the_same(
    checkpointing, accelerator, monkeypatch, tmp_path
):
    """What peft makes wide, autocast makes narrow at once: the way there and back changes no bit."""
    config = TrainConfig(gradient_checkpointing=checkpointing, **SMALL)
    wide, cast = [], LoraLayer._cast_input_dtype
    monkeypatch.setattr(
        LoraLayer, "_cast_input_dtype", lambda *given: wide.append(cast(*given).dtype is torch.float32) or cast(*given)
    )
    host = klein()
    one = finetune(host, batches, Run(tmp_path / "one", "tiny", "x"), config, accelerator=accelerator)
    assert wide and not any(wide)
    assert all(layer.cast_input_dtype_enabled for layer in host.transformer.modules() if isinstance(layer, LoraLayer))
    monkeypatch.setattr(helpers, "disable_input_dtype_casting", lambda *given: contextlib.nullcontext())
    other = finetune(klein(), batches, Run(tmp_path / "other", "tiny", "x"), config, accelerator=accelerator)
    assert any(wide)
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_losses_are_the_same_whoever_prepares():
    host = klein()
    config = TrainConfig(**SMALL)
    prepare(host, config)
    by_processes, by_a_thread = (FlowMatching(host, batches, config, encoding=Encoding(workers)) for workers in (2, 0))
    assert [by_processes(n).item() for n in (4, 5)] == [by_a_thread(n).item() for n in (4, 5)]


def test_cached_latents_and_text_are_those_of_the_encoders(tmp_path):
    host = klein()
    caches = [Cache(tmp_path / "latents", host.pipe.vae), Cache(tmp_path / "text", host.pipe.text_encoder)]
    batch = prepare_batch(host, batches(0), ["a", "b"])
    plain = encode(host, batch)
    for _ in range(2):
        cached = encode(host, batch, *caches)
        assert torch.allclose(cached.target, plain.target, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(cached.references, plain.references, strict=True))
        assert torch.allclose(cached.text["prompt_embeds"], plain.text["prompt_embeds"], atol=1e-5)
        host.encode_pictures = host.encode_text = None  # the second time, all comes from the disk
    files = list((tmp_path / "latents").rglob("*.safetensors"))
    assert len(files) == 6
    other = Cache(tmp_path / "text", host.pipe.text_encoder, {"max_sequence_length": 8})
    assert other.get(b"c", lambda: {"x": torch.zeros(1)})["x"] == 0
    assert other.get(b"c", lambda: {"x": torch.ones(1)})["x"] == 0  # from the disk
    assert caches[1].get(b"c", lambda: {"x": torch.ones(1)})["x"] == 1  # which read more tokens
    files[0].write_bytes(b"half")
    again = klein()
    assert torch.allclose(encode(again, batch, caches[0]).target, plain.target, atol=1e-5)


def swap(one, other):
    one.write_bytes(other.read_bytes())


OTHERS = {
    "half": lambda file, other: file.write_bytes(file.read_bytes()[:-3]),
    "of another key": swap,
    "zeroed": lambda file, other: file.write_bytes(file.read_bytes()[:-8] + bytes(8)),
    "of other names": lambda file, other: save_torch({"y": torch.ones(4)}, file),
    "of another shape": lambda file, other: save_torch({"x": torch.ones(5)}, file),
    "of another type": lambda file, other: save_torch({"x": torch.ones(4).half()}, file),
    "of before there were digests": lambda file, other: save_torch({"x": torch.ones(4)}, file),
    "without a tensor": lambda file, other: save_torch({}, file),
    "no file of the kind": lambda file, other: file.write_text("mine"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_cache_makes_anew_what_is_of_something_else(other, tmp_path):
    cache = Cache(tmp_path, torch.nn.Linear(2, 2))
    values = {key: {"x": torch.full((4,), float(i)), "count": torch.tensor(i)} for i, key in ((1, b"a"), (2, b"b"))}
    files = []
    for key in values:
        cache.get(key, lambda key=key: values[key])
        files += sorted(set(tmp_path.rglob("*.safetensors")) - set(files))
    OTHERS[other](*files)
    made = []
    for _ in range(2):
        found = cache.get(b"a", lambda: made.append(1) or values[b"a"])
        assert found.keys() == {"x", "count"} and torch.equal(found["x"], torch.ones(4)) and found["count"] == 1
    assert made == [1]
    assert torch.equal(cache.get(b"b", lambda: None)["x"], torch.full((4,), 2.0))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space, or name"),
        (errno.EDQUOT, "free some space, or name"),
        (errno.EACCES, "see that its folder is writable, or name"),
        (errno.ENOTDIR, "see that its folder is writable"),
    ],
)
def test_a_cache_that_cannot_be_written_says_why(number, advice, tmp_path, monkeypatch):
    def fails(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr("sparse_context.images.time.sleep", lambda seconds: None)
    with pytest.raises(OSError, match=f"could not be written .*{os.strerror(number)}.*: {advice}"):
        Cache(tmp_path, torch.nn.Linear(2, 2)).get(b"a", lambda: {"x": torch.ones(1)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_a_cache_keeps_tensors_of_any_type_and_shape(dtype, tmp_path):
    cache, tensors = Cache(tmp_path, torch.nn.Linear(2, 2)), {"x": torch.ones(2, 3).to(dtype), "none": torch.ones(0, 2)}
    for make in (lambda: tensors, None):
        found = cache.get(b"a", make)
        assert (
            found["x"].dtype == dtype and torch.equal(found["x"].float(), torch.ones(2, 3)) and len(found["none"]) == 0
        )


@pytest.mark.parametrize("sees", [False, True])
def test_a_cached_prompt_serves_other_references_unless_the_encoder_sees_them(tmp_path, sees):
    host = klein()
    host.text_sees_references = sees
    cache = Cache(tmp_path, host.pipe.text_encoder)
    for number in (0, 1):
        encode(host, prepare_batch(host, batches(number), ["", ""]), text_cache=cache)
    assert len(list(tmp_path.rglob("*.safetensors"))) == (4 if sees else 1)


def test_trainable_shares_the_parameters():
    host = klein()
    trained = prepare(host, TrainConfig(**SMALL))
    assert isinstance(trained, Trainable)
    assert {id(p) for p in trained.parameters()} == {id(p) for p in host.transformer.parameters() if p.requires_grad}
