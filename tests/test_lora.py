"""LoRA files of every naming scheme on tiny real pipelines: what is taken is exact, and what is not is told."""

import json

import pytest
import tiny
import torch
from diffusers import Flux2KleinPipeline, FluxKontextPipeline
from safetensors.torch import load_file, save_file

from sparse_context.pipelines.load import load as load_model
from sparse_context.pipelines.lora import load_lora
from sparse_context.pipelines.lora_file import read_lora
from sparse_context.pipelines.spec import ModelSpec

BUILD = {name: tiny.CASES[name].build for name in ("klein", "klein-modular", "kontext", "qwen-edit", "flux3")}


def draw(*shape, seed=0):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(shape, rank=2, seed=0):
    """down and up for a weight of this shape."""
    return draw(rank, shape[1], seed=seed), draw(shape[0], rank, seed=seed + 1)


def weights_of(module):
    """What each linear layer does, adapters included, as a matrix; by the names without adapters."""
    found = {}
    for name, layer in module.named_modules():
        base = getattr(layer, "base_layer", layer)
        if isinstance(base, torch.nn.Linear) and not name.endswith("base_layer") and ".lora_" not in name:
            with torch.no_grad():
                bias = 0 if base.bias is None else base.bias.float()
                eye = torch.eye(base.in_features, dtype=base.weight.dtype)
                found[name] = (layer(eye).float() - bias).T
    return found


def assert_changed(before, module, changes, tolerance=1e-5):
    """Each layer is what it was plus its change, and those without one are what they were."""
    after = weights_of(module)
    assert after.keys() == before.keys() and changes.keys() <= before.keys()
    for name, weight in after.items():
        wanted = before[name] + changes[name] if name in changes else before[name]
        torch.testing.assert_close(
            weight, wanted, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
    for name, change in changes.items():
        assert change.abs().max() > 1e-3, name


def load(pipe, tensors, folder, metadata=None, name="lora.safetensors", scale=1.0):
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name, metadata)
    load_lora(pipe, read_lora(str(folder / name)), scale)


# Naming schemes -------------------------------------------------------------------------------------------------------

A_B = ("lora_A.weight", "lora_B.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.default.weight", "lora_B.default.weight")
OLD = ("lora.down.weight", "lora.up.weight")
LINEAR = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")

QKV = [f"transformer_blocks.1.attn.{name}" for name in ("to_q", "to_k", "to_v")]
ADDED = [f"transformer_blocks.1.attn.add_{name}_proj" for name in "qkv"]
SINGLE = "single_transformer_blocks.1"

ORIGINAL = {  # the layer in the file -> those of diffusers
    "klein": {
        "double_blocks.1.img_attn.qkv": QKV,
        "double_blocks.1.txt_attn.qkv": ADDED,
        "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
        "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
        "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
        "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.linear_out"],
        "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.linear_in"],
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
        "single_blocks.1.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
        "single_blocks.1.linear2": [f"{SINGLE}.attn.to_out"],
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
        "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
        "single_stream_modulation.lin": ["single_stream_modulation.linear"],
        "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
        "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
        "final_layer.linear": ["proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    },
    "kontext": {
        "double_blocks.1.img_attn.qkv": QKV,
        "double_blocks.1.txt_attn.qkv": ADDED,
        "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
        "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
        "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
        "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"],
        "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.net.0.proj"],
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
        "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
        "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
        "single_blocks.1.linear1": [
            *(f"{SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
            f"{SINGLE}.proj_mlp",
        ],
        "single_blocks.1.linear2": [f"{SINGLE}.proj_out"],
        "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
        "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
        "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
        "final_layer.linear": ["proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    },
    "flux3": {
        "content_mode_blocks.image.0.q_proj": ["mode_blocks.image.0.attn.to_q"],
        "content_mode_blocks.image_cond.0.attn_out": ["mode_blocks.image_cond.0.attn.to_out.0"],
        "txt_mode_blocks.0.mlp_in": ["txt_mode_blocks.0.ff.linear_in"],
        "single_blocks.1.v_proj": [f"{SINGLE}.attn.to_v"],
        "single_blocks.1.mlp_out": [f"{SINGLE}.ff.linear_out"],
        "emb_in.image": ["x_embedders.image"],
        "txt_in": ["context_embedder"],
        "time_in.in_layer": ["timestep_embedder.linear_1"],
        "single_stream_modulations.txt.lin": ["single_stream_modulations.txt.linear"],
        "final_layer.image.linear": ["proj_out"],
        "final_layer.image.adaLN_modulation.1": ["norm_out.linear"],
    },
}
ORIGINAL["klein-modular"] = ORIGINAL["klein"]
XLABS = {
    "double_blocks.1.processor.qkv_lora1": QKV,
    "double_blocks.1.processor.qkv_lora2": ADDED,
    "double_blocks.0.processor.proj_lora1": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.processor.proj_lora2": ["transformer_blocks.0.attn.to_add_out"],
    "single_blocks.1.processor.qkv_lora": [f"{SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")],
    "single_blocks.0.processor.proj_lora": ["single_transformer_blocks.0.proj_out"],
}


def same(transformer):
    """diffusers' own names, of every linear layer."""
    return {name: [name] for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}


def flat(prefix):
    return lambda name: prefix + name.replace(".", "_")


def dotted(prefix):
    return lambda name: prefix + name


SCHEMES = {
    "diffusers": (None, dotted("transformer."), A_B),
    "diffusers of old": (None, dotted("transformer."), LINEAR),
    "a transformer's": (None, dotted(""), A_B),
    "peft": (None, dotted("base_model.model."), A_B),
    "peft by the adapter's name": (None, dotted("transformer."), PEFT),
    "comfy with diffusers' names": (None, dotted("diffusion_model."), DOWN_UP),
    "kohya with diffusers' names": (None, flat("lora_unet_"), DOWN_UP),
    "kohya of the transformer": (None, flat("lora_transformer_"), DOWN_UP),
    "a compiled transformer's": (None, dotted("transformer._orig_mod."), A_B),
    "lora.down": (None, dotted("transformer."), OLD),
    "ai-toolkit": (ORIGINAL, dotted("diffusion_model."), A_B),
    "comfy": (ORIGINAL, dotted("diffusion_model."), DOWN_UP),
    "kohya": (ORIGINAL, flat("lora_unet_"), DOWN_UP),
    "fal": (ORIGINAL, dotted("base_model.model."), A_B),
    "bare": (ORIGINAL, dotted(""), A_B),
    "checkpoint": (ORIGINAL, dotted("model.diffusion_model."), DOWN_UP),
    "xlabs": ({"kontext": XLABS}, dotted(""), ("down.weight", "up.weight")),
}
"""Which layers, how they are spelled, and what the two matrices are called."""

COMBINATIONS = [
    (case, name) for case in BUILD for name, (layers, *_) in SCHEMES.items() if layers is None or case in layers
]


def make(transformer, layers, spelled, ends, alphas, dtype=torch.float32):
    """A file's tensors, and by hand the changes that they stand for. alphas: of some layers, by their numbers."""
    tensors, changes = {}, {}
    for number, (name, modules) in enumerate(layers.items()):
        linear = [transformer.get_submodule(module) for module in modules]
        shape = sum(layer.out_features for layer in linear), linear[0].in_features
        rank = 2 + number % 3
        down, up = (each.to(dtype) for each in matrices(shape, rank, seed=10 * number))
        tensors |= dict(zip((f"{spelled(name)}.{end}" for end in ends), (down, up), strict=True))
        scale = 1.0
        if alphas is not None and number % 4 != 3:  # some without, as if it were their rank
            alpha = alphas[number % len(alphas)]
            tensors[f"{spelled(name)}.alpha"] = torch.tensor(alpha)
            scale = alpha / rank
        change = scale * up.float() @ down.float()
        if "adaLN" in name:  # the shift comes first there
            change = torch.cat(change.chunk(2)[::-1])
        changes |= dict(zip(modules, change.split([layer.out_features for layer in linear]), strict=True))
    return tensors, changes


@pytest.mark.parametrize("alphas", [None, (1.0, 7.0, 0.3)], ids=["plain", "alpha"])
@pytest.mark.parametrize(("case", "scheme"), COMBINATIONS)
def test_every_layer_of_every_scheme_is_exact(case, scheme, alphas, tmp_path):
    pipe = BUILD[case]()
    layers, spelled, ends = SCHEMES[scheme]
    layers = same(pipe.transformer) if layers is None else layers[case]
    tensors, changes = make(pipe.transformer, layers, spelled, ends, alphas)
    before = weights_of(pipe.transformer)
    load(pipe, tensors, tmp_path)
    assert_changed(before, pipe.transformer, changes)


@pytest.mark.parametrize("case", BUILD)
def test_a_part_of_it_and_fused(case, tmp_path):
    pipe = BUILD[case]()
    tensors, changes = make(pipe.transformer, same(pipe.transformer), dotted("transformer."), A_B, (3.0, 1.0))
    before = weights_of(pipe.transformer)
    load(pipe, tensors, tmp_path, scale=0.5)
    halves = {name: 0.5 * change for name, change in changes.items()}
    assert_changed(before, pipe.transformer, halves)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not any("lora" in name for name, _ in pipe.transformer.named_modules())
    assert_changed(before, pipe.transformer, halves)


@pytest.mark.parametrize(
    ("case", "scheme"),
    [
        ("klein", "diffusers"),
        ("klein", "kohya"),
        ("klein", "ai-toolkit"),
        ("klein", "fal"),
        ("kontext", "diffusers"),
        ("kontext", "kohya"),
        ("kontext", "xlabs"),
        ("qwen-edit", "diffusers"),
        ("flux3", "diffusers"),
        ("qwen-edit", "kohya with diffusers' names"),
        ("flux3", "ai-toolkit"),
    ],
)
def test_where_diffusers_converts_all_it_is_what_diffusers_makes(case, scheme, tmp_path):
    first, second = BUILD[case](), BUILD[case]()
    layers, spelled, ends = SCHEMES[scheme]
    layers = same(first.transformer) if layers is None else layers[case]
    known = {
        name: modules
        for name, modules in layers.items()
        if "blocks" in name and (case == "klein" or "linear1" not in name)
    }
    tensors, _ = make(first.transformer, known, spelled, ends, (2.0, 4.0) if scheme.startswith("kohya") else None)
    load(first, tensors, tmp_path)
    second.load_lora_weights(dict(tensors))
    assert_changed(weights_of(first.transformer), second.transformer, {}, 1e-6)


def test_several_schemes_in_one_file(tmp_path):
    pipe = BUILD["klein"]()
    names = {
        "double_blocks.0.img_attn.proj": flat("lora_unet_"),
        "double_blocks.1.img_attn.qkv": dotted("diffusion_model."),
    }
    tensors, changes = {}, {}
    for (name, spelled), ends in zip(names.items(), (DOWN_UP, A_B), strict=True):
        some = make(pipe.transformer, {name: ORIGINAL["klein"][name]}, spelled, ends, (1.0,))
        tensors, changes = tensors | some[0], changes | some[1]
    own = make(pipe.transformer, {"x_embedder": ["x_embedder"]}, dotted(""), A_B, None)
    before = weights_of(pipe.transformer)
    load(pipe, tensors | own[0], tmp_path)
    assert_changed(before, pipe.transformer, changes | own[1])


def test_a_layer_s_name_is_no_ending_of_others(tmp_path):
    """peft takes names for endings: `proj_out` of FLUX.1 is also that of each single block."""
    pipe = BUILD["kontext"]()
    layers = {name: [name] for name in ("proj_out", "single_transformer_blocks.0.proj_out")}
    tensors, changes = make(pipe.transformer, layers, dotted("transformer."), A_B, (1.0, 5.0))
    before = weights_of(pipe.transformer)
    load(pipe, tensors, tmp_path)
    assert_changed(before, pipe.transformer, changes)


# What else a file says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_settings_of_peft_in_the_file(rslora, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    trained, pipe = BUILD["klein"](), BUILD["klein"]()
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=rslora,
        target_modules=["to_q", "to_out.0", "proj_out"],
        rank_pattern={"proj_out": 4},
        alpha_pattern={"transformer_blocks.1.attn.to_q": 7},
        init_lora_weights=False,
    )
    trained.transformer.add_adapter(config)
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(trained.transformer),
        weight_name="lora.safetensors",
        transformer_lora_adapter_metadata=trained.transformer.peft_config["default"].to_dict(),
    )
    held = load_file(tmp_path / "lora.safetensors")
    changes = {}
    for key, down in held.items():
        if "lora_A" in key:
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            alpha = 7 if name == "transformer_blocks.1.attn.to_q" else 3
            scale = alpha / (len(down) ** 0.5 if rslora else len(down))
            changes[name] = scale * held[key.replace("lora_A", "lora_B")] @ down
    assert len(changes) == 5
    before = weights_of(pipe.transformer)
    load_lora(pipe, read_lora(str(tmp_path / "lora.safetensors")))
    assert_changed(before, pipe.transformer, changes)


def test_settings_of_peft_beside_the_file(tmp_path):
    pipe = BUILD["klein"]()
    tensors, changes = make(pipe.transformer, {"x_embedder": ["x_embedder"]}, dotted("base_model.model."), A_B, None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    before = weights_of(pipe.transformer)
    load(pipe, tensors, tmp_path, name="adapter_model.safetensors")
    assert_changed(before, pipe.transformer, {"x_embedder": 3 * changes["x_embedder"]})


def test_settings_and_an_alpha_that_agree_and_that_do_not(tmp_path):
    pipe = BUILD["klein"]()
    layers = {"x_embedder": ["x_embedder"]}
    tensors, changes = make(pipe.transformer, layers, dotted("transformer."), A_B, (6.0,))
    told = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})}
    before = weights_of(pipe.transformer)
    load(pipe, tensors, tmp_path, told)
    assert_changed(before, pipe.transformer, changes)
    told = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2})}
    with pytest.raises(
        ValueError, match="transformer.x_embedder.alpha makes a scale of 3, and its settings of 1: save it"
    ):
        load(BUILD["klein"](), tensors, tmp_path, told)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float64"])
def test_number_formats_load_with_their_values(kind, tmp_path):
    pipe = BUILD["klein"]()
    tensors, changes = make(
        pipe.transformer, ORIGINAL["klein"], flat("lora_unet_"), DOWN_UP, (1.0, 3.0), getattr(torch, kind)
    )
    before = weights_of(pipe.transformer)
    load(pipe, tensors, tmp_path)
    assert_changed(before, pipe.transformer, changes)


def test_an_alpha_in_eight_bits_or_of_whole_numbers(tmp_path):
    pipe = BUILD["klein"]()
    down, up = matrices((32, 8))
    for alpha in (torch.tensor(4).to(torch.float8_e4m3fn), torch.tensor(4), torch.tensor([4.0])):
        pipe = BUILD["klein"]()
        before = weights_of(pipe.transformer)
        load(
            pipe,
            {"x_embedder.lora_A.weight": down, "x_embedder.lora_B.weight": up, "x_embedder.alpha": alpha},
            tmp_path,
        )
        assert_changed(before, pipe.transformer, {"x_embedder": 2 * up @ down})


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_that_are_no_numbers_are_refused(kind, tmp_path):
    down, up = (each.to(getattr(torch, kind)) for each in matrices((32, 8)))
    down[0, 0] = torch.nan
    with pytest.raises(ValueError, match="which with x_embedder.lora_A.weight .* some of its weights are no finite"):
        load(None, {"x_embedder.lora_A.weight": down, "x_embedder.lora_B.weight": up}, tmp_path)


def test_numbers_beyond_the_model_s_format_are_refused(tmp_path):
    pipe = BUILD["klein"]()
    pipe.transformer.to(torch.float16)
    down, up = matrices((32, 8))
    with pytest.raises(
        ValueError, match="x_embedder.lora_A.weight has numbers beyond float16: run the model in bfloat16"
    ):
        load(pipe, {"x_embedder.lora_A.weight": 1e6 * down, "x_embedder.lora_B.weight": up}, tmp_path)


def test_biases_of_a_lora(tmp_path):
    """Some layers have one and others not; a fused layer's is split as its rows are."""
    pipe = BUILD["kontext"]()
    layers = {name: ORIGINAL["kontext"][name] for name in ("double_blocks.1.img_attn.qkv", "img_in")}
    tensors, changes = make(pipe.transformer, layers, dotted("diffusion_model."), A_B, (1.0, 6.0))
    bias = draw(96, seed=99)
    tensors["diffusion_model.double_blocks.1.img_attn.qkv.lora_B.bias"] = bias
    before, zeros = weights_of(pipe.transformer), torch.zeros(1, 32)
    with torch.no_grad():
        told = {name: pipe.transformer.get_submodule(name)(zeros) for name in QKV}
        load(pipe, tensors, tmp_path)
        for name, part in zip(QKV, bias.split(32), strict=True):
            torch.testing.assert_close(pipe.transformer.get_submodule(name)(zeros), told[name] + part / 2)
    after = weights_of(pipe.transformer)  # whose biases are those of the base
    for name, part in zip(QKV, bias.split(32), strict=True):
        torch.testing.assert_close(after[name] - part[:, None] / 2, before[name] + changes[name], rtol=1e-5, atol=1e-5)


def test_a_dora_of_peft_arrives_as_one(tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    trained, pipe = BUILD["klein"](), BUILD["klein"]()
    trained.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["to_q", "to_out.0"]))
    with torch.no_grad():
        for i, (name, weight) in enumerate(trained.transformer.named_parameters()):
            if "lora_" in name:
                weight.copy_(draw(*weight.shape, seed=i).abs())
    layers = get_peft_model_state_dict(trained.transformer)
    told = {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.use_dora": True}
        )
    }
    load(pipe, {f"transformer.{key}": tensor for key, tensor in layers.items()}, tmp_path, told)
    expected, found = weights_of(trained.transformer), weights_of(pipe.transformer)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    lost = {f"transformer.{key}": tensor for key, tensor in layers.items() if "magnitude" not in key}
    with pytest.raises(ValueError, match="it is a DoRA with no scale for 4 layers"):
        load(BUILD["klein"](), lost, tmp_path, told)


# LoKr -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["transformer.", "lycoris_", "diffusion_model."])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lokr_is_exact(scheme, scale, tmp_path):
    pipe = BUILD["klein"]()
    original = scheme == "diffusion_model."
    spelled = flat(scheme) if scheme == "lycoris_" else dotted(scheme)
    full, inner = (
        ("double_blocks.0.img_attn.proj", "single_blocks.0.linear2")
        if original
        else ("transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.attn.to_out")
    )
    w1, w2 = draw(4, 4, seed=1), draw(8, 8, seed=2)
    v1, v2a, v2b = draw(4, 4, seed=3), draw(8, 2, seed=4), draw(2, 32, seed=5)
    held = {
        full: {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9.0)},
        inner: {"lokr_w1": v1, "lokr_w2_a": v2a, "lokr_w2_b": v2b, "alpha": torch.tensor(3.0)},
    }
    tensors = {f"{spelled(name)}.{end}": tensor for name, ends in held.items() for end, tensor in ends.items()}
    changes = {
        "transformer_blocks.0.attn.to_out.0": torch.kron(w1, w2),
        "single_transformer_blocks.0.attn.to_out": 1.5 * torch.kron(v1, v2a @ v2b),
    }
    before = weights_of(pipe.transformer)
    load(pipe, tensors, tmp_path, scale=scale)
    assert_changed(before, pipe.transformer, {name: scale * change for name, change in changes.items()})


def test_a_lokr_of_fused_projections_fuses_those_of_the_model_and_leaves_the_user_s_numbers(tmp_path):
    pipe = BUILD["klein"]()
    w1, w2 = draw(4, 4, seed=1), draw(24, 8, seed=2)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    before = weights_of(pipe.transformer)
    state = torch.get_rng_state()
    load(pipe, {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    whole = torch.cat([before[f"transformer_blocks.0.attn.{part}"] for part in ("to_q", "to_k", "to_v")])
    after = weights_of(pipe.transformer)["transformer_blocks.0.attn.to_qkv"]
    torch.testing.assert_close(after, whole + torch.kron(w1, w2), rtol=1e-5, atol=1e-5)


# Text encoders --------------------------------------------------------------------------------------------------------


def kontext_with_text():
    """FLUX.1 with its first text encoder, for which diffusers takes a LoRA."""
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe = tiny.build_kontext(FluxKontextPipeline)
    config = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=8,
    )
    pipe.register_modules(text_encoder=CLIPTextModel(config).eval())
    return pipe


@pytest.mark.parametrize(
    ("spelled", "ends"),
    [
        (dotted("text_encoder.text_model."), A_B),
        (dotted("text_encoder."), A_B),
        (flat("lora_te1_text_model_"), DOWN_UP),
        (flat("lora_te_text_model_"), DOWN_UP),
        (dotted("text_encoders.clip_l.transformer.text_model."), DOWN_UP),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_layers_of_the_text_encoder_that_diffusers_takes_arrive(spelled, ends, beside, tmp_path):
    pipe = kontext_with_text()
    layers = {
        f"encoder.layers.{i}.{name}": [f"encoder.layers.{i}.{name}"]
        for i, name in ((0, "self_attn.q_proj"), (1, "self_attn.out_proj"), (1, "mlp.fc1"))
    }
    deeper = hasattr(pipe.text_encoder, "text_model")
    model = pipe.text_encoder.text_model if deeper else pipe.text_encoder
    text, changes = make(model, layers, spelled, ends, (1.0, 5.0))
    tensors, others = make(pipe.transformer, {"x_embedder": ["x_embedder"]}, dotted("transformer."), A_B, None)
    before, text_before = weights_of(pipe.transformer), weights_of(model)
    load(pipe, text | (tensors if beside else {}), tmp_path, scale=0.5)
    assert_changed(text_before, model, {name: 0.5 * change for name, change in changes.items()})
    assert_changed(before, pipe.transformer, {name: 0.5 * change for name, change in others.items()} if beside else {})


TEXT = {
    "klein": [
        "text_encoder.model.layers.0.self_attn.q_proj",
        "lora_te_model_layers_0_mlp_up_proj",
        "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj",
    ],
    "kontext": [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder_2.encoder.block.0.layer.0.q",
        "lora_te2_encoder_block_0",
        "lora_te3_encoder_block_0",
    ],
    "qwen-edit": ["text_encoder.model.layers.0.self_attn.q_proj"],
    "flux3": ["text_encoder.layers.0.q_proj"],
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(("case", "name"), [(case, name) for case, names in TEXT.items() for name in names])
def test_layers_of_other_text_encoders_are_refused_by_their_names(case, name, beside, tmp_path):
    pipe = BUILD[case]()
    before = weights_of(pipe.transformer)
    layers, _ = make(pipe.transformer, {"proj_out": ["proj_out"]}, dotted("transformer."), A_B, None)
    text = {
        f"{name}.lora_down.weight": draw(2, 8),
        f"{name}.lora_up.weight": draw(8, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }
    alone = "" if beside else ", all that it holds,"
    with pytest.raises(ValueError) as caught:
        load(pipe, text | (layers if beside else {}), tmp_path)
    assert f"1 layer ({name}.lora_down.weight){alone} would be lost" in str(caught.value)
    assert "encoder: pass one of the transformer alone." in str(caught.value) and "empty" not in str(caught.value)
    assert_changed(before, pipe.transformer, {})
    assert not getattr(pipe.transformer, "peft_config", None)


def test_what_changes_nothing_is_not_lost(tmp_path):
    """Zeros that some tools write for what they did not train."""
    pipe = BUILD["kontext"]()
    tensors, changes = make(pipe.transformer, ORIGINAL["kontext"], flat("lora_unet_"), DOWN_UP, (1.0,))
    zeros = {
        "lora_te1_x.lora_down.weight": draw(2, 8),
        "lora_te1_x.lora_up.weight": torch.zeros(8, 2),
        "lora_te1_x.alpha": torch.tensor(1.0),
        "lora_unet_img_in.diff_b": torch.zeros(32),
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff": torch.zeros(16),
    }
    before = weights_of(pipe.transformer)
    load(pipe, tensors | zeros, tmp_path)
    assert_changed(before, pipe.transformer, changes)


# What is refused ------------------------------------------------------------------------------------------------------


def pair(name, shape, ends=A_B):
    """Two matrices of rank 2 for a layer of this shape."""
    return dict(zip((f"{name}.{end}" for end in ends), matrices(shape), strict=True))


Q, X = "transformer.transformer_blocks.0.attn.to_q", "transformer.x_embedder"
GOOD = pair(Q, (32, 32)) | pair(X, (32, 8))  # for the tiny klein
K = "lora_unet_double_blocks_0_img_attn_proj"
KOHYA = pair(K, (32, 32), DOWN_UP)
TEXT_LAYER = "text_encoder.model.layers.0.mlp.up_proj"


def without(*keys):
    return {key: tensor for key, tensor in GOOD.items() if key not in keys}


def with_down(tensor):
    return GOOD | {f"{X}.lora_A.weight": tensor}


REFUSED = {
    "DoRA": (
        GOOD | {f"{Q}.dora_scale": draw(32, 1)},
        f"it is a DoRA, and its 1 scale ({Q}.dora_scale) would be lost: pass a LoRA without DoRA.",
    ),
    "DoRA of kohya": (KOHYA | {f"{K}.dora_scale": draw(32, 1)}, f"1 scale ({K}.dora_scale) would be lost"),
    "DoRA of ai-toolkit": (
        pair("diffusion_model.img_in", (32, 8)) | {"diffusion_model.img_in.dora_scale": draw(1, 8)},
        "it is a DoRA",
    ),
    "half a DoRA of peft": (
        GOOD | {f"{X}.lora_magnitude_vector": draw(32)},
        f"it is a DoRA with 1 scale ({X}.lora_magnitude_vector) for 2 layers ({Q}.lora_A.weight and",
    ),
    "no up": (
        without(f"{Q}.lora_B.weight"),
        f"{Q}.lora_A.weight is there without the other matrix of its pair (lora_B or lora_up): get the whole file.",
    ),
    "no down": (without(f"{Q}.lora_A.weight"), f"{Q}.lora_B.weight is there without the other matrix of its pair"),
    "no up of kohya": ({f"{K}.lora_down.weight": draw(2, 32)}, f"{K}.lora_down.weight is there without the other"),
    "an alpha alone": (
        GOOD | {"transformer.proj_out.alpha": torch.tensor(1.0)},
        "transformer.proj_out.alpha is there without its two matrices: get the whole file.",
    ),
    "half a LoKr": ({f"{X}.lokr_w1": draw(2, 2)}, f"{X}.lokr_w1 is there without a factor of its Kronecker product"),
    "bias differences": (
        GOOD | {f"{X}.diff_b": draw(32)},
        f"1 key ({X}.diff_b) would be lost, being no matrices of a LoRA: pass a plain one.",
    ),
    "norms": (GOOD | {f"{Q}.norm.diff": draw(32)}, f"1 key ({Q}.norm.diff) would be lost"),
    "norms of a control LoRA": (GOOD | {f"{Q}.norm_q.weight": draw(16)}, f"1 key ({Q}.norm_q.weight) would be lost"),
    "a key of two lines": (GOOD | {"x\ny.weight": draw(2)}, "1 key (x y.weight) would be lost"),
    "LoHa": (
        {f"lycoris_x.hada_{name}": draw(2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "it holds no LoRA, but 4 keys (lycoris_x.hada_w1_a and lycoris_x.hada_w1_b ...): pass a LoRA.",
    ),
    "LoHa beside": (GOOD | {"lycoris_x.hada_w1_a": draw(2, 2)}, "1 key (lycoris_x.hada_w1_a) would be lost"),
    "scales of eight bits": (GOOD | {f"{X}.scale_weight": draw(1)}, f"1 key ({X}.scale_weight) would be lost"),
    "a Tucker core": (GOOD | {f"{X}.lora_mid.weight": draw(2, 2)}, f"1 key ({X}.lora_mid.weight) would be lost"),
    "a whole model": ({"x.weight": draw(32, 8), "y.weight": draw(8, 32)}, "it holds no LoRA, but 2 keys (x.weight and"),
    "no such layer": (
        GOOD | pair("transformer.layers.0", (8, 8)) | pair("transformer.layers.1", (8, 8)),
        "Flux2Transformer2DModel has no transformer.layers.0 and 1 more of its layers: pass a LoRA of this model.",
    ),
    "a layer that is not linear": (pair("norm_out.norm", (32, 32)), "Flux2Transformer2DModel has no norm_out.norm:"),
    "a block too many": (
        pair("diffusion_model.double_blocks.7.img_attn.proj", (32, 32)),
        "Flux2Transformer2DModel has no diffusion_model.double_blocks.7.img_attn.proj: pass a LoRA of this model.",
    ),
    "narrower": (
        with_down(draw(2, 6)),
        f"{X}.lora_A.weight has shape (2, 6), and x_embedder of this model needs (2, 8): pass a LoRA of this model.",
    ),
    "wider": (GOOD | {f"{X}.lora_B.weight": draw(40, 2)}, f"{X}.lora_B.weight has shape (40, 2), and x_embedder"),
    "two ranks": (
        GOOD | {f"{X}.lora_B.weight": draw(32, 4)},
        f"{X}.lora_A.weight is of rank 2 and {X}.lora_B.weight of rank 4: get the whole file.",
    ),
    "no rank": ({f"{X}.lora_A.weight": torch.zeros(0, 8), f"{X}.lora_B.weight": torch.zeros(32, 0)}, "is of rank 0"),
    "a convolution": (with_down(draw(2, 8, 1, 1)), f"{X}.lora_A.weight has shape (2, 8, 1, 1), of no linear layer"),
    "whole numbers": (
        with_down(torch.ones(2, 8, dtype=torch.int8)),
        f"{X}.lora_A.weight has whole numbers (int8): save it in floats.",
    ),
    "many alphas": (GOOD | {f"{X}.alpha": draw(3)}, f"{X}.alpha has shape (3,), not one number: pass a plain LoRA."),
    "no number": (with_down(torch.full((2, 8), torch.nan)), f"which with {X}.lora_A.weight does not fit this model"),
    "an alpha without end": (GOOD | {f"{X}.alpha": torch.tensor(torch.inf)}, "some of its weights are no finite"),
    "one layer by two names": (
        GOOD | pair("diffusion_model.img_in", (32, 8)),
        f"diffusion_model.img_in.lora_A.weight and {X}.lora_A.weight both change x_embedder: pass a file with",
    ),
    "two adapters": (GOOD | {f"{X}.lora_A.b.weight": draw(2, 8)}, "are the same matrix of one layer: pass a file with"),
    "LoKr and LoRA": (
        GOOD | {"proj_out.lokr_w1": draw(2, 4), "proj_out.lokr_w2": draw(4, 8)},
        "proj_out.lokr_w1 is of a LoKr and",
    ),
    "a LoKr of another width": (
        {"proj_out.lokr_w1": draw(2, 4), "proj_out.lokr_w2": draw(4, 4)},
        "proj_out.lokr_w1 makes a change of shape (8, 16), and proj_out of this model needs (8, 32)",
    ),
    "text alone": (
        pair(TEXT_LAYER, (8, 8)),
        f"1 layer ({TEXT_LAYER}.lora_A.weight), all that it holds, would be lost, since Flux2KleinPipeline takes no",
    ),
    "a LoKr of text": (
        GOOD | {"lora_te_x.lokr_w1": draw(2, 2), "lora_te_x.lokr_w2": draw(2, 2)},
        "1 layer (lora_te_x.lokr_w1) would be lost",
    ),
    "text beside": (GOOD | pair("lora_te_x", (8, 8), DOWN_UP), "1 layer (lora_te_x.lora_down.weight) would be lost"),
    "zeros for a text encoder": (
        {key: torch.zeros(8, 8) for key in pair(TEXT_LAYER, (8, 8))},
        "it changes nothing, as all of its numbers are zeros: pass another one.",
    ),
    "empty": ({}, "it is empty."),
}
"""By what is wrong: what the file holds, and what is said of it, also by the command (cli/)."""


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_lost_or_is_broken_is_told_and_changes_nothing(kind, tmp_path):
    pipe, (tensors, says) = BUILD["klein"](), REFUSED[kind]
    before = weights_of(pipe.transformer)
    with pytest.raises(ValueError) as caught:
        load(pipe, tensors, tmp_path)
    assert says in str(caught.value) and str(tmp_path / "lora.safetensors") in str(caught.value)
    assert_changed(before, pipe.transformer, {})
    assert not getattr(pipe.transformer, "peft_config", None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"transformer.r": 8, "transformer.lora_alpha": 8}, "is of rank 2, and by its settings of 8: save it anew."),
        ({"transformer.use_dora": True, "transformer.r": 2}, "it is a DoRA with no scale for 2 layers ("),
        (
            {"transformer.init_lora_weights": "pissa_niter_4"},
            "it belongs to weights that pissa_niter_4 changed: convert",
        ),
        ({"transformer.init_lora_weights": "olora"}, "it belongs to weights that olora changed"),
        (
            {"transformer.r": 0, "transformer.lora_alpha": 1},
            "its settings of peft make no scale of transformer_blocks.0",
        ),
        ({"transformer.r": 2, "transformer.lora_alpha": "four"}, "its settings of peft make no scale of"),
        ({"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"(": 2}}, "make no scale of"),
        ("{", "its settings of peft cannot be read"),
    ],
)
def test_settings_that_make_another_lora_of_it(settings, says, tmp_path):
    told = {"lora_adapter_metadata": settings if isinstance(settings, str) else json.dumps(settings)}
    with pytest.raises(ValueError) as caught:
        load(BUILD["klein"](), GOOD, tmp_path, told)
    assert says in str(caught.value)


def test_a_name_is_not_enough_to_unpickle(tmp_path):
    torch.save(GOOD, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is not a safetensors file, and for safety nothing else is read"):
        read_lora(str(tmp_path / "a.safetensors"))


def test_nothing_is_loaded_before_the_file_is_found_wrong(tiny_model, tmp_path, monkeypatch):
    save_file(without(f"{Q}.lora_B.weight"), tmp_path / "a.safetensors")
    monkeypatch.setattr("sparse_context.pipelines.load._load_plain", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="is there without the other matrix"):
        load_model(ModelSpec(str(tiny_model), device="cpu", lora=str(tmp_path / "a.safetensors")))
