"""Tiny pipelines that are whole, from the prompt to the picture, as folders that the command loads."""

import json
from functools import partial

import torch
from diffusers import (
    Flux2KleinAutoBlocks,
    Flux2KleinBaseAutoBlocks,
    Flux2KleinBaseModularPipeline,
    Flux2KleinInpaintPipeline,
    Flux2KleinModularPipeline,
    Flux3AutoBlocks,
    Flux3DistilledAutoBlocks,
    Flux3DistilledModularPipeline,
    Flux3ModularPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from tiny import (
    TEXT_WIDTH,
    VISION_TOKENS,
    build_flux2,
    build_flux2_modular,
    build_flux3,
    build_kontext,
    build_longcat,
    build_qwen,
    tiny_text_encoder,
    tiny_tokenizer,
    vision_processor,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)


class ImageOnlyProcessor(Qwen2VLProcessor):
    """Qwen's processor without its part for videos, which does not build without torchvision."""

    def __init__(self, image_processor=None, tokenizer=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer)
        self.image_token, self.video_token = VISION_TOKENS["image_token_id"], VISION_TOKENS["video_token_id"]
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)


def whole_klein(folder):
    build_flux2(Flux2KleinInpaintPipeline).save_pretrained(folder)
    return {"max_sequence_length": 12, "text_encoder_out_layers": [1, 2]}


def whole_modular(folder, blocks, cls):
    pipe = build_flux2_modular(blocks(), cls)
    own = cls(blocks=blocks())
    parts = {name: part for name, part in pipe.components.items() if name != "guider"}
    own.update_components(**parts, text_encoder=tiny_text_encoder(), tokenizer=tiny_tokenizer())
    own.save_pretrained(str(folder), overwrite_modular_index=True)
    return {"max_sequence_length": 12, "text_encoder_out_layers": [1, 2]}


def whole_flux3(folder, blocks, cls):
    pipe = build_flux3(blocks)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0}
    tokenizer = tiny_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH // 2,
        "intermediate_size": 16,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": TEXT_WIDTH // 2,
        "deepstack_visual_indexes": [0],
    }
    text_encoder = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))
    template = "the {% for m in messages %}{{ m['content'] }}{% endfor %}"  # an empty prompt has tokens too
    processor = LlavaProcessor(vision_processor(), tokenizer, chat_template=template)
    own = cls(blocks=blocks())
    parts = {name: part for name, part in pipe.components.items() if name not in ("guider", "image_processor")}
    own.update_components(**parts, text_encoder=text_encoder, tokenizer=processor)
    own.save_pretrained(str(folder), overwrite_modular_index=True)
    return {"max_sequence_length": 80, "text_encoder_out_layers": [1, 2]}


def whole_kontext(folder, cls):
    pipe = build_kontext(cls, levels=6)
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "the", "cat"])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    t5 = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    small = {"hidden_size": TEXT_WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "t": 2, "h": 3, "e</w>": 4}
    pipe.register_modules(
        text_encoder=CLIPTextModel(
            CLIPTextConfig(vocab_size=5, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, **small)
        ),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=5, d_model=TEXT_WIDTH, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        ),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[]),
        tokenizer_2=t5,
    )
    pipe.tokenizer.model_max_length = 77
    pipe.save_pretrained(folder)
    return {"max_sequence_length": 12}


def whole_longcat(folder):
    build_longcat().save_pretrained(folder)
    return {}


def whole_qwen(folder, cls):
    """With LongCat's text encoder, which is of the same class."""
    torch.manual_seed(0)
    pipe, other = build_qwen(cls), build_longcat()
    processor = ImageOnlyProcessor(other.text_processor.image_processor, other.tokenizer)
    pipe.register_modules(text_encoder=other.text_encoder, tokenizer=other.tokenizer, processor=processor)
    pipe.save_pretrained(folder)
    return {}


WHOLE = {
    "Flux2KleinInpaintPipeline": whole_klein,
    "Flux2KleinModularPipeline": partial(whole_modular, blocks=Flux2KleinAutoBlocks, cls=Flux2KleinModularPipeline),
    "Flux2KleinBaseModularPipeline": partial(
        whole_modular, blocks=Flux2KleinBaseAutoBlocks, cls=Flux2KleinBaseModularPipeline
    ),
    "Flux3ModularPipeline": partial(whole_flux3, blocks=Flux3AutoBlocks, cls=Flux3ModularPipeline),
    "Flux3DistilledModularPipeline": partial(
        whole_flux3, blocks=Flux3DistilledAutoBlocks, cls=Flux3DistilledModularPipeline
    ),
    "FluxKontextPipeline": partial(whole_kontext, cls=FluxKontextPipeline),
    "FluxKontextInpaintPipeline": partial(whole_kontext, cls=FluxKontextInpaintPipeline),
    "LongCatImageEditPipeline": whole_longcat,
    "QwenImageEditPipeline": partial(whole_qwen, cls=QwenImageEditPipeline),
    "QwenImageEditInpaintPipeline": partial(whole_qwen, cls=QwenImageEditInpaintPipeline),
    "QwenImageEditPlusPipeline": partial(whole_qwen, cls=QwenImageEditPlusPipeline),
}
"""Saves a tiny pipeline of that class to a folder, and returns what its call needs of its own."""


def save_whole(name: str, folder):
    """The folder, with the call settings beside the weights."""
    settings = WHOLE[name](folder)
    (folder / "call.json").write_text(json.dumps({"num_inference_steps": 2, **settings}))
    return folder
