"""What the nodes say: options and tooltips."""

from __future__ import annotations

TASKS = ("auto", "edit", "subject", "global")
SELECTORS = ("auto", "edges", "saliency", "subject", "contrast", "detail", "residual", "uniform", "random", "text")
COVERAGES = ("auto", "0 %", "5 %", "10 %", "20 %", "30 %", "50 %")
OVERVIEWS = ("trained", "none", "auto", "2", "4", "8", "16")
KEEP_HERE = "keep here"
MEANINGS = (KEEP_HERE, "drop here")

TIPS: dict[str, dict[str, str]] = {
    "SparseContext": {
        "description": (
            "Makes image editing faster. A reference image gives the model thousands of tokens, and most of "
            "them show little. This node keeps the ones that matter and drops the rest. Put it between the model "
            "loader (and its LoRAs) and the sampler."
        ),
        "model": "The model: FLUX.2, FLUX.1 Kontext or Qwen-Image-Edit. Load LoRAs before this node.",
        "keep": (
            "How many reference tokens to keep. 0.2 keeps a fifth. Lower is faster, higher is more faithful. 1 "
            "keeps all and changes nothing."
        ),
        "task": (
            "What you want to do. edit: change something and keep the layout. subject: put the person or thing "
            "into a new image. global: change the whole image, such as its style or colours. auto: one "
            "reference is an edit, several are subjects."
        ),
        "selector": (
            "How to choose tokens. auto: the task decides. edges: outlines. saliency: the main subject. subject: "
            "the subject and its outline. contrast: what differs from the background. detail: texture. residual: "
            "fine detail. uniform: evenly spread. random: by chance. text: what phrases names. Only auto, detail, "
            "uniform and random work without images."
        ),
        "phrases": (
            "What you mean in each image, such as the red car. One line is for all images; several lines are one for "
            "each, and the word none is for an image without. A subject keeps what the phrase names, an edit keeps "
            "everything else."
        ),
        "text_model": (
            "What finds the phrases: the folder or the Hugging Face id of a CLIPSeg, OWLv2, Grounding DINO or SAM 3. "
            "An id is downloaded. Leave it empty to use CLIPSeg, if it has been downloaded before."
        ),
        "keep_each": (
            "A value for each reference, with commas between, in place of keep: 0.5, 0.1. A value from 0 to 1 is "
            "a share, a whole number from 2 up is a number of tokens, and auto takes as many as an image needs. "
            "Leave it empty to use keep for all references."
        ),
        "coverage": (
            "The share of kept tokens that is spread evenly over the image, so that no large area is left out. "
            "auto: the task decides."
        ),
        "overview": (
            "A small copy of the whole reference beside the sharp tokens. It counts as part of keep. Use it only "
            "with weights that were trained for it. trained: only if a LoRA before this node says so. A number: "
            "how many times smaller the copy is. auto: a size that suits keep."
        ),
        "selection_seed": "The seed of the selector random. It does not change the noise of your image.",
        "vae": (
            "Only for overviews. With a VAE, the small copy is scaled down as an image and then encoded, as in "
            "training. Without one, the latents of the reference are averaged, which is less exact."
        ),
        "images": (
            "The image of each reference, in the same order as its reference latents. Connect the image that "
            "goes into VAE Encode, after any resize or crop. With no image at all, tokens are chosen from the "
            "latents."
        ),
        "masks": "Masks from the node Sparse Context Mask, in any order.",
        "out_model": "The model, which now sees the kept tokens only. The model that came in is not changed.",
        "out_kept": "The references with their dropped parts faded. If something does not fit, it says so here.",
    },
    "SparseContextMask": {
        "description": (
            "Says with a mask what to keep or to drop of one reference. For a mask from a phrase, such as the red "
            "car, use ComfyUI's own node SAM3 Detect. Use several of these nodes for several masks."
        ),
        "mask": (
            "The mask, as large as the image of the reference. Paint one in Load Image: right-click, Open in "
            "MaskEditor."
        ),
        "meaning": (
            "keep here: tokens under the mask are kept first. drop here: tokens under the mask are dropped first. "
            "If masks overlap, drop wins."
        ),
        "reference": "The number of the reference, from 1: mask 1 belongs to image1.",
        "out_mask": "Connect it to mask1, mask2 and so on of the node Sparse Context.",
    },
    "SparseContextReport": {
        "description": (
            "Says how many reference tokens the sampler really used, and how much faster that should be. Put it "
            "behind the sampler."
        ),
        "model": "The model from the node Sparse Context, the one that the sampler uses.",
        "latent": (
            "The latent from the sampler. It makes this node wait for the sampler, and passes through unchanged."
        ),
        "out_latent": "The same latent, for VAE Decode.",
        "out_report": "The report as text, for example for Preview as Text.",
    },
}
"""By node, its description and the tooltip of each input and output."""
