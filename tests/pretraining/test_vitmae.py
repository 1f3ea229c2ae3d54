"""The masked autoencoder of transformers, with the same weights and the same noise."""

from collections.abc import Mapping

import pytest
import timm
import torch
from torch import Tensor, nn

from mtl.models.backbone import Backbone
from mtl.pretraining.decoders import TokenDecoder
from mtl.pretraining.masks import hidden_count, hide
from mtl.pretraining.targets import Target, hidden_loss, patch_target
from mtl.pretraining.token_drop import visible_tokens

transformers = pytest.importorskip("transformers")

VIT = "vit_tiny_patch16_224"
SIDE, PATCH, WIDTH, DEPTH = 96, 16, 64, 2
GRID = (SIDE // PATCH, SIDE // PATCH)

NAMES = {
    "model.cls_token": "vit.embeddings.cls_token",
    "model.pos_embed": "vit.embeddings.position_embeddings",
    "model.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "model.blocks": "vit.layers",
    "norm": "vit.layernorm",
    "embed": "decoder.decoder_embed",
    "mask_token": "decoder.mask_token",
    "blocks": "decoder.decoder_layers",
    "last_norm": "decoder.decoder_norm",
    "predict": "decoder.decoder_pred",
}
IN_BLOCKS = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}


def ours() -> tuple[Backbone, TokenDecoder]:
    """Return a tiny encoder and decoder, none of whose tensors is as initialised."""
    backbone = Backbone(VIT, (SIDE, SIDE))
    # With positions for this size, as the peer resamples them in another way.
    backbone.encoder.model = timm.create_model(VIT, img_size=SIDE, depth=3)
    backbone.encoder.model.prune_intermediate_layers(prune_norm=True, indices=[2])
    decoder = TokenDecoder(backbone, PATCH, WIDTH, DEPTH)
    with torch.no_grad():
        for parameter in (*backbone.parameters(), *decoder.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone, decoder


def theirs(tensors: Mapping[str, Tensor], normalized: bool) -> nn.Module:
    """Return the peer with these weights."""
    config = transformers.ViTMAEConfig(
        image_size=SIDE, patch_size=PATCH, hidden_size=192, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=768, decoder_hidden_size=WIDTH, decoder_num_hidden_layers=DEPTH,
        decoder_num_attention_heads=WIDTH // 32, decoder_intermediate_size=4 * WIDTH, layer_norm_eps=1e-6,
        mask_ratio=0.75, norm_pix_loss=normalized,
    )  # fmt: skip
    peer: nn.Module = transformers.ViTMAEForPreTraining(config)
    peer.load_state_dict({**renamed(tensors), "decoder.decoder_pos_embed": positions()})
    return peer


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of encoder and decoder by the peer's names, queries, keys and values apart."""
    state = {}
    for name, tensor in tensors.items():
        own = max((n for n in NAMES if f"{name}.".startswith(f"{n}.")), key=len)
        number, _, inner = name.removeprefix(own).removeprefix(".").partition(".")
        if not own.endswith("blocks"):
            state[NAMES[own] + name.removeprefix(own)] = tensor
            continue
        module, _, kind = inner.rpartition(".")
        prefix = f"{NAMES[own]}.{number}"
        if module == "attn.qkv":
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{prefix}.attention.{letter}_proj.{kind}"] = part
        else:
            state[f"{prefix}.{IN_BLOCKS.get(module, module)}.{kind}"] = tensor
    return state


def positions() -> Tensor:
    """Return sin-cos positions of a decoder, the class token's being 0: sines of row and column, then cosines."""
    rates = 10000.0 ** -(torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    rows, columns = (torch.tensor(axis).double() for axis in zip(*[divmod(i, GRID[1]) for i in range(36)], strict=True))
    angles = torch.cat([rows.outer(rates), columns.outer(rates)], dim=1)
    table = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    return torch.cat([torch.zeros(1, WIDTH), table]).unsqueeze(0)


@pytest.mark.parametrize("target", ["normalized", "raw"])
def test_loss_and_gradients_are_those_of_transformers(target: Target) -> None:
    backbone, decoder = ours()
    own = {**dict(backbone.encoder.named_parameters()), **dict(decoder.named_parameters())}
    peer = theirs(own, target == "normalized")
    image, noise = torch.rand(3, 3, SIDE, SIDE), torch.rand(3, *GRID)

    mask = hide(noise, hidden_count(GRID, 0.75))
    prediction = decoder(visible_tokens(backbone, image, mask))
    picture = (image - backbone.mean) / backbone.std  # the peer's input is its target
    loss = hidden_loss(prediction, patch_target(picture, PATCH, target), mask)
    expected = peer(picture, noise=noise.flatten(1))
    assert torch.equal(mask.flatten(1).float(), expected.mask)
    torch.testing.assert_close(prediction, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)

    loss.backward()
    expected.loss.backward()
    gradients = renamed({name: parameter.grad for name, parameter in own.items()})
    others = {name: parameter.grad for name, parameter in peer.named_parameters() if parameter.grad is not None}
    fixed = {"vit.embeddings.position_embeddings"}  # which the peer does not learn
    assert gradients.keys() - others.keys() == fixed
    assert others.keys() <= gradients.keys()
    for name, gradient in others.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)
