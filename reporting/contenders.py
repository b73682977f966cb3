"""Our methods and other libraries' MAE, set to the same work: one training step as a call, and its FLOPs."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import SIZES, StepRandom, ViT, normalize_patches, parameter_groups
from methods import METHODS

PEERS = {"hf": "transformers", "lightly": "lightly", "torchvision": "torchvision"}  # and the package each needs


def build_method(args, name: str) -> torch.nn.Module:
    """The method on the encoder that is asked for; of a decoder's size, what the method's Config knows is set."""
    usual = zip((args.width, args.depth, args.heads), SIZES[args.model], strict=True)
    Method = METHODS[name]
    fields = {f.name for f in dataclasses.fields(Method.Config)}
    decoder = {key: vars(args)[key] for key in ("decoder_width", "decoder_depth", "decoder_heads") if key in fields}
    encoder = ViT(args.image_size, args.patch_size, *(given or size for given, size in usual))
    return Method(encoder, Method.Config(**decoder))


def draw(args, method, B: int, device: torch.device):
    images = torch.randint(0, 256, (B, 3, args.image_size, args.image_size), dtype=torch.uint8, device=device)
    return method.draw(images, torch.arange(B), StepRandom(0, 0, B, None, device))


def our_loss(args, name: str, B: int, device: torch.device):
    method = build_method(args, name).to(device).train()
    batch = draw(args, method, B, device)
    return method, lambda network: network(batch)["loss"], method.update_teacher


def peer_loss(args, name: str, B: int, device: torch.device):
    """The peer's MAE of the same sizes, on the same images and as many masked patches, with the same target."""
    ours = build_method(args, "mae")
    encoder, decoder, batch = ours.encoder, ours.config, draw(args, ours, B, device)
    if name == "lightly":
        network = LightlyMAE(encoder, decoder).to(device).train()
        return network, lambda network: network(*batch), lambda progress: None
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = dict(
        hidden_size=encoder.width, num_hidden_layers=len(encoder.blocks),
        num_attention_heads=encoder.blocks[0].attn.heads, intermediate_size=4 * encoder.width,
        image_size=args.image_size, patch_size=args.patch_size, decoder_hidden_size=decoder.decoder_width,
        decoder_num_hidden_layers=decoder.decoder_depth, decoder_num_attention_heads=decoder.decoder_heads,
        decoder_intermediate_size=4 * decoder.decoder_width, mask_ratio=decoder.mask_ratio,
        norm_pix_loss=decoder.norm_pixels,
    )  # fmt: skip
    noise = torch.rand(B, encoder.patches, device=device)
    network = ViTMAEForPreTraining(ViTMAEConfig(**sizes)).to(device).train()
    return network, lambda network: network(pixel_values=batch.images, noise=noise).loss, lambda progress: None


class LightlyMAE(torch.nn.Module):
    """MAE as lightly's example puts it together from its modules on timm."""

    def __init__(self, encoder: ViT, decoder):
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        D, W, self.p = encoder.width, decoder.decoder_width, encoder.patch_size
        size, depth, heads = encoder.image_size, len(encoder.blocks), encoder.blocks[0].attn.heads
        vit = VisionTransformer(size, self.p, num_classes=0, embed_dim=D, depth=depth, num_heads=heads)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(num_patches=encoder.patches, patch_size=self.p, embed_dim=D, decoder_embed_dim=W,
                                      decoder_depth=decoder.decoder_depth,
                                      decoder_num_heads=decoder.decoder_heads)  # fmt: skip

    def forward(self, images: Tensor, mask) -> Tensor:
        from lightly.models import utils

        visible, masked = F.pad(mask.visible + 1, (1, 0)), mask.masked + 1  # token 0 is the class token
        x = self.decoder.embed(self.backbone.encode(images=images, idx_keep=visible))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(x), self.backbone.sequence_length))
        x = self.decoder.decode(utils.set_at_index(tokens, visible, x.type_as(tokens)))
        target = normalize_patches(utils.get_at_index(utils.patchify(images, self.p), mask.masked))
        return F.mse_loss(self.decoder.predict(utils.get_at_index(x, masked)), target)


def stepper(args, name: str, B: int, precision: str, compiled: bool, device: torch.device) -> Callable:
    """One training step as a call, of a method or of a peer."""
    torch.manual_seed(0)
    module, loss_of, update_teacher = (peer_loss if name in PEERS else our_loss)(args, name, B, device)
    groups = parameter_groups(module, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    network = torch.compile(module) if compiled else module

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(network)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_teacher(0.5)

    return step


def flops(step: Callable) -> int:
    # It cannot count a CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
