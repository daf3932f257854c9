"""Models of transformers: vision models, and CLIP and SigLIP with their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clipray.errors import ModelError, one_line
from clipray.models.dry_run import trial, without_weights
from clipray.models.weights import downloaded, quiet

PREFIX = "hf:"
WITH_TEXT = ("clip", "siglip")
"""Values of `model_type` whose texts are encoded, too."""
CONVNEXT_SQUASH_PX = 384  # from here on ConvNeXT's image processor crops nothing


@dataclass(frozen=True)
class Described:
    """Width of the vectors, how images are prepared, as `ResolvedModel.preprocess`, and whether there is a text tower."""

    embed_dim: int
    preprocess: dict[str, Any]
    has_text: bool


class HuggingFaceNetwork(torch.nn.Module):
    """A model of transformers with open_clip's methods.

    Attributes:
        pools: whether the network's own pooled output counts; its weights may be missing in a checkpoint that was made
            for something else.
        logit_scale, logit_bias: of CLIP and SigLIP.
    """

    def __init__(self, network: Any, *, pools: bool = True) -> None:
        super().__init__()
        self.network, self.pools = network, pools
        self.logit_scale, self.logit_bias = (getattr(network, name, None) for name in ("logit_scale", "logit_bias"))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encode_image(pixels)

    def encode_image(self, pixels: torch.Tensor, normalize: bool = False) -> torch.Tensor:  # noqa: ARG002 - as open_clip's
        """Normalised images (b, 3, height, width) -> (b, d), raw.

        The image features of CLIP and SigLIP; else the pooled output, else the class token, else the mean of a map.
        """
        if hasattr(self.network, "get_image_features"):
            return self._vector(self.network.get_image_features(pixel_values=pixels))
        return self._vector(self.network(pixel_values=pixels))

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:  # noqa: ARG002 - as open_clip's
        """(b, context_length) int64 -> (b, d), raw."""
        return self._vector(self.network.get_text_features(input_ids=tokens))

    def _vector(self, output: Any) -> torch.Tensor:
        if isinstance(output, torch.Tensor):  # of transformers before 5
            return output
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.pools:
            return pooled.flatten(1)
        hidden = output.last_hidden_state
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


class HuggingFaceTokenizer:
    """A model's own tokenizer, as `clipray.models.tokenizer.Tokenizer`.

    Attributes:
        context_length: tokens that the network reads of a text, start and end tokens included.
    """

    zero_padded = False

    def __init__(self, name: str) -> None:
        folder = folder_of(name)
        with quiet():
            config = _transformers().AutoConfig.from_pretrained(folder)
            self._tokenizer = _transformers().AutoTokenizer.from_pretrained(folder)
        self.context_length = int(config.text_config.max_position_embeddings)

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of n texts ((n, context_length) int64), and which of them were cut ((n,) bool)."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.context_length}
        tokens = self._tokenizer(list(texts), **options, return_tensors="pt").input_ids
        return tokens, torch.tensor([count > self.context_length for count in self.counts(texts)], dtype=torch.bool)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, start and end tokens included, before anything is cut."""
        with quiet():
            return [len(ids) for ids in self._tokenizer(list(texts), truncation=False).input_ids]


def folder_of(name: str) -> Path:
    """The folder of `hf:/path`, or of `hf:org/model`, which is downloaded unless it is there.

    Raises:
        ModelError: it could not be downloaded.
    """
    place = name.removeprefix(PREFIX)
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if place.startswith(("/", ".", "~")) or place.count("/") != 1:
        raise ModelError(f"model.name: {name}: expected a folder with transformers' config.json, or `hf:org/model`")
    from huggingface_hub import snapshot_download

    texts = ["*.json", "*.txt", "*.model"]
    folder = Path(downloaded(name, lambda: snapshot_download(place, allow_patterns=[*texts, "*.safetensors"])))
    if not any(folder.glob("*.safetensors")):
        folder = Path(downloaded(name, lambda: snapshot_download(place, allow_patterns=[*texts, "*.bin"])))
    return folder


def describe(folder: Path) -> Described:
    """What a folder's model is, by its configurations alone.

    Raises:
        ModelError: transformers is not installed, or cannot read them; images are prepared in a way that is not known here.
    """
    transformers, name = _transformers(), f"{PREFIX}{folder}"
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder)
            processor = transformers.AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"model.name: {name}: transformers cannot read it: {one_line(error)}") from error
    preprocess = preprocess_of_processor(processor, name)
    height, width = preprocess["size"]
    try:
        vector = trial(network_without_weights(name, (height, width)), (height, width))
    except Exception as error:
        raise ModelError(f"model.name: {name}: it encodes no images: {one_line(error)}") from error
    return Described(vector.shape[-1], preprocess, config.model_type in WITH_TEXT)


def network_without_weights(name: str, image_size: tuple[int, int]) -> torch.nn.Module:
    """The network of a folder's configuration, see `without_weights`."""
    transformers = _transformers()
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder_of(name))
        return without_weights(lambda: HuggingFaceNetwork(transformers.AutoModel.from_config(config)), image_size)


def load(name: str) -> HuggingFaceNetwork:
    """The network with its weights, in fp32.

    Raises:
        ModelError: weights are missing in its folder.
    """
    network, info = _transformers().AutoModel.from_pretrained(
        folder_of(name), local_files_only=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    pooler = [key for key in missing if key.startswith("pooler.")]
    if missing != pooler:
        raise ModelError(f"{name}: its weights lack {', '.join(missing[:3])}{' …' if missing[3:] else ''}")
    return HuggingFaceNetwork(network.float(), pools=not pooler)


def preprocess_of_processor(processor: Any, where: str) -> dict[str, Any]:
    """An image processor's settings in the words of open_clip's transform; see `ResolvedModel.preprocess`.

    Raises:
        ModelError: it does something else than scale, crop the centre, and normalise.
    """
    scale_to, mode = _scaling(processor, where)
    size, crop = scale_to, getattr(processor, "crop_size", None)
    if getattr(processor, "do_center_crop", None) and crop:
        size = [crop["height"], crop["width"]]
    elif _is_convnext(processor) and mode == "shortest":
        size = [processor.size["shortest_edge"]] * 2
    elif mode == "shortest":
        raise ModelError(f"model.name: {where}: its images are not cropped to one size")
    if getattr(processor, "do_pad", None) or abs(processor.rescale_factor * 255 - 1) > 1e-3:
        raise ModelError(f"model.name: {where}: its images are padded, or scaled otherwise than to 0 … 1")
    normalizes = processor.do_normalize
    return {
        "size": size,
        "mode": "RGB",
        "mean": list(processor.image_mean) if normalizes else [0.0] * 3,
        "std": list(processor.image_std) if normalizes else [1.0] * 3,
        "interpolation": Image.Resampling(int(processor.resample)).name.lower(),
        "resize_mode": mode,
        "fill_color": 0,
        "scale_to": scale_to,
        "crop_offset": "floor",
    }


def _scaling(processor: Any, where: str) -> tuple[list[int], str]:
    """(height, width) in px to which images are scaled, and open_clip's word for how."""
    size = {key: value for key, value in dict(processor.size or {}).items() if value}
    if processor.do_resize and size.keys() == {"height", "width"}:
        return [size["height"], size["width"]], "squash"
    if processor.do_resize and size.keys() == {"shortest_edge"}:
        edge = size["shortest_edge"]
        if not _is_convnext(processor):
            return [edge, edge], "shortest"
        if edge >= CONVNEXT_SQUASH_PX:
            return [edge, edge], "squash"
        return [int(edge / processor.crop_pct)] * 2, "shortest"
    actual = f"do_resize={processor.do_resize}, size={size}"
    raise ModelError(
        f"model.name: {where}: expected an image processor that scales to one height and width, found {actual}"
    )


def _is_convnext(processor: Any) -> bool:
    """Its `size` is what is left after the crop, and `crop_pct` of what is scaled."""
    return getattr(processor, "crop_pct", None) is not None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError('a model `hf:…` needs transformers: pip install "clipray[hf]"') from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
