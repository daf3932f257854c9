"""Which names of models load here and encode, with random weights: the table in docs/models.md.

    .venv/bin/python -m tools.try_models [NAME…] > table.md

Each name has a process of its own. What a name needs of the hub, such as a tokenizer, is used where it is on this
machine; nothing is asked of a network.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from clipray.errors import ModelError
from clipray.job import Model

TEXTS = ["a dog", "a photo of a red bicycle in front of a brick wall"]
NAMES = [
    "RN50", "ViT-B-32", "convnext_base", "EVA02-B-16", "ViTamin-S", "coca_ViT-B-32",
    "MobileCLIP-S1", "MobileCLIP2-S0", "MobileCLIP2-S2", "MobileCLIP2-S3", "MobileCLIP2-S4", "MobileCLIP2-B",
    "PE-Core-T-16-384", "PE-Core-S-16-384", "PE-Core-B-16", "PE-Core-L-14-336",
    "ViT-B-16-SigLIP", "ViT-B-16-SigLIP-i18n-256", "ViT-B-16-SigLIP2", "ViT-B-32-SigLIP2-256", "ViT-L-16-SigLIP2-256",
    "ViT-L-14-CLIPA", "ViT-L-14-worldwide",
    "roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32", "nllb-clip-base", "mt5-base-ViT-B-32",
    "timm/resnet50", "timm/convnext_tiny", "timm/efficientnet_b0", "timm/swin_tiny_patch4_window7_224",
    "timm/vit_small_patch14_dinov2", "timm/vit_small_patch14_reg4_dinov2", "timm/vit_small_patch16_dinov3",
    "timm/convnext_tiny.dinov3_lvd1689m", "timm/eva02_small_patch14_224", "timm/beit_base_patch16_224",
    "timm/samvit_base_patch16", "timm/vit_base_patch16_siglip_224", "timm/mobilenetv4_conv_small",
]  # fmt: skip


def try_name(name: str) -> str:
    """A row of the table: name, what became of an image, and of texts."""
    from clipray.models.resolve import resolve

    try:
        model = resolve(Model(name=name, pretrained="random", seed=0))
        image = _image(model)
        return f"| `{name}` | {image} | {_text(model) if model.has_text else 'no text tower'} |"
    except ModelError as error:
        return f"| `{name}` | not loaded: {_reason(name, error)} | |"


def _image(model: Any) -> str:
    import numpy as np

    from clipray.models.image_encoder import ImageEncoder, sample_image

    height, width = model.image_size
    encoder = ImageEncoder(model, precision="fp32", batch_size=1)
    vectors = encoder.encode(sample_image(height, width)[None]).vectors["clip"]
    if vectors.shape != (1, model.embed_dim) or not np.isfinite(vectors).all():
        return f"wrong: {vectors.shape}, expected (1, {model.embed_dim}), finite"
    return f"{model.embed_dim} numbers of {height} x {width} px"


def _text(model: Any) -> str:
    import numpy as np
    import torch

    from clipray.models.load import load
    from clipray.models.text_encoder import TextEncoder

    try:
        encoder = TextEncoder(model, precision="fp32", batch_size=2)
        vectors, _ = encoder.encode(TEXTS)
        is_right = vectors.shape == (2, model.embed_dim) and bool(np.isfinite(vectors).all())
        return f"yes, up to {encoder.context_length} tokens" if is_right else f"wrong: {vectors.shape}"
    except ModelError as error:
        if "tokenizer could not be loaded" not in str(error):
            raise
    network: Any = load(model)
    length = int(getattr(network, "context_length", 0) or network.text.context_length)
    with torch.inference_mode():
        vector = network.encode_text(torch.arange(1, length + 1)[None])
    is_right = vector.shape == (1, model.embed_dim) and bool(vector.isfinite().all())
    return f"{'tower only' if is_right else 'wrong'}: its tokenizer, {_tokenizer(model.name)}, is not on this machine"


def _tokenizer(name: str) -> str:
    return f"`{_text_config(name).get('hf_tokenizer_name')}`"


def _reason(name: str, error: ModelError) -> str:
    base = _text_config(name).get("hf_model_name")
    if base and "its weights could not be loaded" in str(error):
        return f"the configuration of its text tower, `{base}`, is not on this machine"
    return str(error).replace("|", "/")[:160]


def _text_config(name: str) -> dict[str, Any]:
    import open_clip

    config = open_clip.get_model_config(name) or {}
    return dict(config.get("text_cfg", {}))


def main(names: list[str]) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    print("| name | an image | texts |\n|---|---|---|")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for row in processes.map(try_name, names or NAMES):
            print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
