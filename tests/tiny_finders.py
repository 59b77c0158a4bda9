"""Tiny real models that find what a phrase names: CLIPSeg red, blue and green, OWLv2 red alone; others are random."""

import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Sam3Config,
    Sam3Model,
    Sam3VideoConfig,
    SwinConfig,
    ViTImageProcessorPil,
)

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
WEIGHTS = "model.safetensors"
SIDE, PATCH = 64, 8  # pixels of CLIPSeg's input, and of its patches


def scene(width: int, height: int, colour: str = "red", seed: int = 0) -> Image.Image:
    """Grey noise, and a colour in the upper left quarter."""
    pixels = np.random.default_rng(seed).normal(128, 6, (height, width, 3))
    pixels[: height // 2, : width // 2] = COLOURS[colour]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def letters(length: int = 16) -> CLIPTokenizer:
    """A tokenizer of single letters."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase), start, end]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length, pad_token=end)


def text_config(tokenizer: CLIPTokenizer, width: int = 16) -> dict:
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        **ends,
    )


def save_clipseg(folder: Path) -> None:
    """A CLIPSeg that finds red, blue and green, by weights that are set by hand.

    Each patch is looked at by itself. It reads a word by the number of its letters, so what has other lengths than
    these words is nowhere.
    """
    tokenizer = letters()
    vision = dict(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = CLIPSegConfig(
        text_config=text_config(tokenizer),
        vision_config=vision,
        projection_dim=16,
        extract_layers=[0],
        reduce_dim=4,
        decoder_num_attention_heads=1,
        decoder_intermediate_size=4,
    )
    with torch.random.fork_rng():
        model = CLIPSegForImageSegmentation(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        look, read, decoder = model.clip.vision_model.embeddings, model.clip.text_model.embeddings, model.decoder
        colours = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(2, 3)])  # each with its opposite: a mean of 0
        look.patch_embedding.weight.copy_(colours[:, :, None, None].expand(-1, -1, PATCH, PATCH) / PATCH**2)
        look.position_embedding.weight[:, 6:] = torch.tensor([10.0, -10.0])  # beside which the colours are small
        unlike = 1.5 * torch.eye(3) - 0.5  # a colour less the mean of the others
        decoder.reduces[0].weight[:3, :3] = unlike
        decoder.reduces[0].weight[:3, 6] = -0.12  # and less this share of 10, so that grey is below 0
        length = torch.eye(16)
        read.position_embedding.weight.copy_(length)
        model.clip.text_projection.weight.copy_(length)
        seen = torch.layer_norm(length, (16,))  # one high value in a row, where the word ends
        low, high = seen[0, 1], seen[0, 0]
        for channel, word in enumerate(("red", "green", "blue")):
            decoder.film_mul.weight[channel, len(word) + 1] = 1 / (high - low)
            decoder.film_mul.bias[channel] = -low / (high - low)
        # After a norm, the channel that nobody asks for says whether the other one is above 0, and not by how much
        decoder.transposed_convolution.weight[3] = -10.0
        decoder.transposed_convolution.bias.fill_(-1.0)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)


def save_owlv2(folder: Path) -> None:
    """An OWLv2 that finds what is red, whatever the phrase. Its boxes have the size of a patch, and their middle in the
    lower right corner of the red patch, which is where OWLv2's boxes are before it learns anything."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = letters()
        vision = dict(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            initializer_range=0.3,
        )
        model = Owlv2ForObjectDetection(
            Owlv2Config(text_config=text_config(tokenizer), vision_config=vision, projection_dim=16)
        ).eval()
        processor = Owlv2ImageProcessorPil(size={"height": SIDE, "width": SIDE})
        generator = np.random.default_rng(0)
        red = generator.random((16, SIDE // PATCH, SIDE // PATCH)) < 0.5
        cells = np.where(red[..., None], COLOURS["red"], generator.integers(90, 170, (*red.shape, 3)))
        dark = ~red & (generator.random(red.shape) < 0.5)  # as the padding is, and where it begins
        cells[dark] = generator.integers(0, 170, (dark.sum(), 1))
        pictures = [Image.fromarray(each) for each in cells.astype(np.uint8).repeat(PATCH, 1).repeat(PATCH, 2)]
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            model.owlv2.vision_model.embeddings.position_embedding.weight.zero_()  # a colour is the same everywhere
            for module in model.modules():
                if hasattr(module, "out_proj"):  # each patch for itself
                    module.out_proj.weight.zero_(), module.out_proj.bias.zero_()
            model.box_head.dense2.weight.zero_(), model.box_head.dense2.bias.zero_()
            model.class_head.dense0.weight.zero_(), model.class_head.dense0.bias.zero_()
            features = model.image_embedder(pixels)[0].flatten(0, 2)
            target = torch.from_numpy(red).float().flatten() * 24 - 20  # in doubt it is not red
            known = torch.cat([features, torch.ones(len(features), 1)], 1).double()
            small = 0.1 * torch.eye(known.shape[1], dtype=torch.double)  # weights, which are the same anywhere
            shift = torch.linalg.solve(known.T @ known + small, known.T @ target[:, None].double()).float()
            model.class_head.logit_shift.weight.copy_(shift[:-1].T), model.class_head.logit_shift.bias.copy_(shift[-1])
            model.class_head.logit_scale.weight.zero_(), model.class_head.logit_scale.bias.zero_()
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)


def save_grounding_dino(folder: Path) -> None:
    """A random Grounding DINO of three queries."""
    vocab = [f"[unused{i}]" for i in range(1030)]
    vocab[0], vocab[100], vocab[101], vocab[102], vocab[1012], vocab[1029] = (
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        ".",
        "?",
    )
    for i, letter in enumerate(string.ascii_lowercase):
        vocab[200 + i], vocab[300 + i] = letter, f"##{letter}"
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocab)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = SwinConfig(
            image_size=SIDE,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 1],
            window_size=2,
            out_features=["stage1", "stage2"],
        )
        text = BertConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
        config = GroundingDinoConfig(
            backbone_config=backbone,
            text_config=text,
            num_queries=3,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            d_model=32,
            num_feature_levels=3,
            max_text_len=16,
            disable_custom_kernels=True,
        )
        model = GroundingDinoForObjectDetection(config).eval()
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE})
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)


def save_sam3(folder: Path, video: bool = False) -> None:
    """A random SAM 3; with `video` as a part of a `Sam3VideoModel`, whose tracker is one weight."""
    tokenizer = letters(32)
    small = dict(hidden_size=16, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = dict(
            small,
            model_type="sam3_vit_model",
            intermediate_size=16,
            num_hidden_layers=2,
            image_size=56,
            pretrain_image_size=56,
            patch_size=14,
            window_size=2,
            global_attn_indexes=[1],
        )
        deep = dict(small, num_layers=1, intermediate_size=16)
        config = Sam3Config(
            vision_config=dict(
                backbone_config=vit, fpn_hidden_size=16, backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]]
            ),
            text_config=dict(text_config(tokenizer), model_type="clip_text_model", projection_dim=16),
            geometry_encoder_config=deep,
            detr_encoder_config=deep,
            detr_decoder_config=dict(deep, num_queries=3),
            mask_decoder_config=small,
        )
        model = Sam3Model(config).eval()
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    if video:
        Sam3VideoConfig(detector_config=config.to_dict()).save_pretrained(folder)
        weights = {f"detector_model.{name}": weight for name, weight in load_file(folder / WEIGHTS).items()}
        save_file({**weights, "tracker_model.weight": torch.zeros(1)}, folder / WEIGHTS, {"format": "pt"})
