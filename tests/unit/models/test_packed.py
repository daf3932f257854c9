"""Packed weights: the layers they replace, to the bit or to its last one; which layers they replace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from clipray.job import Model
from clipray.models.encoder import native_precision
from clipray.models.image_encoder import image_tower
from clipray.models.load import load
from clipray.models.packed import PackedAttention, PackedLinear, PackedPatches, pack_weights, packs
from clipray.models.resolve import resolve

pytestmark = pytest.mark.skipif(native_precision("cpu") != "bf16", reason="this CPU does not multiply bf16")


@pytest.fixture(autouse=True)
def _seeded_inference() -> Iterator[None]:
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        yield


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("wide", "out"), [(64, 192), (768, 768), (30, 7)])
def test_a_linear_layer_gives_the_same_bits(wide: int, out: int, bias: bool) -> None:
    plain = nn.Linear(wide, out, bias=bias).bfloat16()
    layer = PackedLinear(plain.weight, plain.bias)
    for rows in (1, 3, 50, 800):
        x = drawn(2, rows, wide)
        assert torch.equal(layer(x), plain(x)), rows
    assert layer.weight.dtype == torch.bfloat16  # open_clip asks for it
    assert torch.equal(layer.weight.to_dense(), plain.weight)


@pytest.mark.parametrize("masked", ["", "causal", "per head"])
def test_attention(masked: str) -> None:
    plain = nn.MultiheadAttention(96, 6, batch_first=True).eval().bfloat16()
    plain.in_proj_bias.normal_()
    x, mask = drawn(4, 13, 96), None
    if masked:
        mask = torch.full((13, 13), -torch.inf).triu(1).bfloat16()
    if masked == "per head":
        mask = torch.where(torch.rand(4 * 6, 13, 13) < 0.3, -torch.inf, mask).bfloat16()
        mask.diagonal(dim1=1, dim2=2).zero_()
    exact = copy.deepcopy(plain).float()
    expected, _ = exact(*[x.float()] * 3, need_weights=False, attn_mask=None if mask is None else mask.float())
    found, weights = PackedAttention(plain)(x, x, x, need_weights=False, attn_mask=mask)
    assert weights is None
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    "argument", [{"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}, {"need_weights": True}]
)
def test_attention_refuses_what_it_would_ignore(argument: dict[str, Any]) -> None:
    packed, x = PackedAttention(nn.MultiheadAttention(8, 2, batch_first=True).bfloat16()), drawn(2, 5, 8)
    with pytest.raises(ValueError, match=next(iter(argument))):
        packed(x, x, x, **argument)
    with pytest.raises(ValueError, match="one tensor"):
        packed(x, drawn(2, 5, 8), x)


@pytest.mark.parametrize(("tall", "wide", "height", "width"), [(8, 8, 32, 32), (4, 6, 32, 31), (14, 14, 224, 224)])
def test_patches(tall: int, wide: int, height: int, width: int) -> None:
    """Also of a picture in which the last patch does not fit."""
    plain = nn.Conv2d(3, 40, (tall, wide), (tall, wide)).bfloat16()
    x = drawn(3, 3, height, width)
    expected, found = plain(x), PackedPatches(plain)(x)
    assert found.shape == expected.shape == (3, 40, height // tall, width // wide)
    assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


def kinds(network: nn.Module) -> dict[str, int]:
    """How many modules of each kind there are that count here."""
    names = [type(module).__name__ for module in network.modules()]
    return {name: names.count(name) for name in ("PackedLinear", "PackedAttention", "PackedPatches")}


@pytest.mark.parametrize(
    ("kind", "linears", "attentions", "patches"),
    [
        ("vit", 2 * 4 + 1, 2, 1),
        ("timm", 6 * 4 + 1, 0, 1),
        ("resnet", 0, 0, 0),  # its convolutions overlap, and its pooling reads its layers' weights itself
    ],
)
def test_networks(saved_models: dict[str, Path], kind: str, linears: int, attentions: int, patches: int) -> None:
    if kind == "timm":
        plain = timm.create_model("test_vit", img_size=64).eval().bfloat16()
    else:
        plain = image_tower(load(resolve(Model(name=f"local-dir:{saved_models[kind]}")))).bfloat16()
    network = copy.deepcopy(plain)
    pack_weights(network)
    assert kinds(network) == {"PackedLinear": linears, "PackedAttention": attentions, "PackedPatches": patches}
    x = drawn(5, 3, 64, 64)
    assert torch.cosine_similarity(network(x).float(), plain(x).float()).min() > 0.9995


def test_attention_across_sequences_stays_plain() -> None:
    """CoCa's decoder; its keys are another sequence."""
    network = nn.ModuleList([ResidualAttentionBlock(32, 2, is_cross_attention=True), ResidualAttentionBlock(32, 2)])
    pack_weights(network.bfloat16())
    assert kinds(network[0])["PackedLinear"] == 0
    assert kinds(network[1]) == {"PackedLinear": 4, "PackedAttention": 1, "PackedPatches": 0}


def test_a_torch_without_the_operators_keeps_its_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ResidualAttentionBlock(32, 2).bfloat16()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not packs()
    pack_weights(network)
    assert kinds(network) == {"PackedLinear": 0, "PackedAttention": 0, "PackedPatches": 0}
