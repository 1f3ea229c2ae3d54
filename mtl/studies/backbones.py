"""Which backbones train with which decoders: one optimizer step of each combination, or the sentence why not."""

import gc
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import timm
import torch
from torch import Tensor
from torch.nn import functional

from mtl.config import DECODERS
from mtl.errors import UserError
from mtl.models.backbone import Backbone, check_name
from mtl.models.heads import Head, encoder_stride, resolve_decoder
from mtl.models.multitask import MultiTaskModel

FAMILIES: dict[str, str] = {
    # Convolutions
    "resnet18": "ResNet",
    "resnet10t": "ResNet-D, tiered stem",
    "resnext50_32x4d": "ResNeXt",
    "wide_resnet50_2": "Wide ResNet",
    "seresnet18": "SE-ResNet",
    "ecaresnet26t": "ECA-ResNet",
    "skresnet18": "SK-ResNet",
    "gcresnet33ts": "GC-ResNet",
    "resnetrs50": "ResNet-RS",
    "resnetv2_18": "ResNet V2",
    "res2net50_26w_4s": "Res2Net",
    "resnest14d": "ResNeSt",
    "tresnet_m": "TResNet",
    "regnetx_002": "RegNetX",
    "regnety_002": "RegNetY",
    "regnetz_005": "RegNetZ",
    "densenet121": "DenseNet",
    "rdnet_tiny": "RDNet",
    "dpn48b": "DPN",
    "vgg11_bn": "VGG",
    "ese_vovnet19b_slim_dw": "VoVNet",
    "efficientnet_b0": "EfficientNet",
    "efficientnet_lite0": "EfficientNet-Lite",
    "tf_efficientnetv2_b0": "EfficientNetV2",
    "mobilenetv1_100": "MobileNetV1",
    "mobilenetv2_050": "MobileNetV2",
    "mobilenetv3_small_100": "MobileNetV3",
    "mobilenetv4_conv_small": "MobileNetV4",
    "mobilenetv4_hybrid_medium_075": "MobileNetV4, hybrid",
    "mobilenetv5_base": "MobileNetV5",
    "mnasnet_small": "MnasNet",
    "mixnet_s": "MixNet",
    "tinynet_e": "TinyNet",
    "fbnetc_100": "FBNet-C",
    "hardcorenas_a": "HardCoRe-NAS",
    "lcnet_050": "LCNet",
    "lcnetv2_small": "LCNetV2",
    "rexnet_100": "ReXNet",
    "ghostnet_050": "GhostNet",
    "ghostnetv2_100": "GhostNetV2",
    "ghostnetv3_050": "GhostNetV3",
    "repghostnet_050": "RepGhostNet",
    "hrnet_w18_small": "HRNet",
    "dla34": "DLA",
    "selecsls42": "SelecSLS",
    "cspresnet50": "CSP-ResNet",
    "cs3darknet_s": "CSP-Darknet",
    "cspnext_tiny": "CSPNeXt",
    "darknet17": "Darknet",
    "gernet_s": "GENet",
    "hgnetv2_b0": "HGNetV2",
    "repvgg_a0": "RepVGG",
    "mobileone_s0": "MobileOne",
    "repvit_m0_9": "RepViT",
    "fastvit_t8": "FastViT",
    "fasternet_t0": "FasterNet",
    "starnet_s050": "StarNet",
    "shvit_s1": "SHViT",
    "convnext_atto": "ConvNeXt",
    "convnextv2_atto": "ConvNeXt V2",
    "edgenext_xx_small": "EdgeNeXt",
    "inception_next_atto": "InceptionNeXt",
    "mambaout_femto": "MambaOut",
    "eca_nfnet_l0": "NFNet",
    "nf_resnet26": "NF-ResNet",
    "nf_regnet_b0": "NF-RegNet",
    "legacy_xception": "Xception",
    "xception41": "Xception, aligned",
    "inception_v3": "Inception v3",
    "inception_v4": "Inception v4",
    "inception_resnet_v2": "Inception-ResNet v2",
    "nasnetalarge": "NASNet",
    "pnasnet5large": "PNASNet",
    "convmixer_768_32": "ConvMixer",
    "csatv2": "CSATv2",
    # Attention in a pyramid
    "botnet26t_256": "BoTNet",
    "halonet26t": "HaloNet",
    "lambda_resnet26t": "LambdaNet",
    "levit_128s": "LeViT",
    "efficientformer_l1": "EfficientFormer",
    "efficientformerv2_s0": "EfficientFormerV2",
    "efficientvit_b0": "EfficientViT (MIT)",
    "efficientvit_m0": "EfficientViT (MSRA)",
    "efficientvim_m1": "EfficientViM",
    "lowformer_b0": "LowFormer",
    "cpubone_nano": "CPUBone",
    "iformer_t": "iFormer",
    "swiftformer_xs": "SwiftFormer",
    "poolformer_s12": "PoolFormer",
    "poolformerv2_s12": "PoolFormerV2",
    "convformer_s18": "ConvFormer",
    "caformer_s18": "CAFormer",
    "pvt_v2_b0": "PVT v2",
    "twins_pcpvt_small": "Twins-PCPVT",
    "twins_svt_small": "Twins-SVT",
    "swin_tiny_patch4_window7_224": "Swin",
    "swin_s3_tiny_224": "Swin-S3",
    "swinv2_tiny_window8_256": "Swin V2",
    "swinv2_cr_tiny_224": "Swin V2-CR",
    "maxvit_pico_rw_256": "MaxViT",
    "maxxvit_rmlp_nano_rw_256": "MaxxViT",
    "coatnet_pico_rw_224": "CoAtNet",
    "mvitv2_tiny": "MViTv2",
    "hiera_tiny_224": "Hiera",
    "sam2_hiera_tiny": "Hiera (SAM 2)",
    "davit_tiny": "DaViT",
    "gcvit_xxtiny": "GCViT",
    "nest_tiny": "NesT",
    "coat_tiny": "CoaT",
    "coat_lite_tiny": "CoaT-Lite",
    "nextvit_small": "Next-ViT",
    "mobilevit_xxs": "MobileViT",
    "mobilevitv2_050": "MobileViTv2",
    "tiny_vit_5m_224": "TinyViT",
    "focalnet_tiny_srf": "FocalNet",
    "visformer_tiny": "Visformer",
    "pit_ti_224": "PiT",
    "crossvit_tiny_240": "CrossViT",
    "sequencer2d_s": "Sequencer",
    # One grid of patches
    "vit_tiny_patch16_224": "ViT",
    "vit_small_patch32_224": "ViT, patch 32",
    "vit_small_patch8_224": "ViT, patch 8",
    "vit_wee_patch16_reg1_gap_256": "ViT, registers",
    "vit_xsmall_patch16_clip_224": "ViT, CLIP",
    "vit_relpos_small_patch16_224": "ViT, relative positions",
    "vit_small_patch16_rope_224": "ViT, RoPE",
    "vit_tiny_r_s16_p8_224": "ViT, ResNet stem",
    "flexivit_small": "FlexiViT",
    "naflexvit_base_patch16_gap": "NaFlexViT",
    "deit_tiny_patch16_224": "DeiT",
    "deit_tiny_distilled_patch16_224": "DeiT, distilled",
    "deit3_small_patch16_224": "DeiT III",
    "beit_base_patch16_224": "BEiT",
    "beitv2_base_patch16_224": "BEiT v2",
    "beit3_base_patch16_224": "BEiT-3",
    "eva02_tiny_patch14_224": "EVA-02",
    "eva02_base_patch16_clip_224": "EVA-02, CLIP",
    "vit_small_patch14_dinov2": "DINOv2",
    "vit_small_patch14_reg4_dinov2": "DINOv2, registers",
    "vit_small_patch16_dinov3": "DINOv3",
    "vit_pe_spatial_tiny_patch16_512": "Perception Encoder",
    "samvit_base_patch16_224": "ViT (SAM)",
    "vitamin_small_224": "ViTamin",
    "xcit_nano_12_p16_224": "XCiT",
    "cait_xxs24_224": "CaiT",
    "convit_tiny": "ConViT",
    "tnt_s_patch16_224": "TNT",
    "volo_d1_224": "VOLO",
    "mixer_s32_224": "MLP-Mixer",
    "resmlp_12_224": "ResMLP",
    "gmlp_ti16_224": "gMLP",
}
"""The family of a small model of each."""

CLASSES = 3
"""Output channels of the head."""

WIDTH = 64
"""Channels of the decoder: few, as only whether it trains is asked."""


class Row(NamedTuple):
    """What became of one backbone.

    Attributes:
        family: What the literature calls it, or timm's module where `FAMILIES` does not have the model.
        name: timm's name of the model.
        parameters: How many the backbone has; None where it cannot be built.
        reasons: By decoder, an empty string where the combination trained, else the sentence why not.
        seconds: Time that the row took.
    """

    family: str
    name: str
    parameters: int | None
    reasons: dict[str, str]
    seconds: float


def study(
    names: Iterable[str] = tuple(FAMILIES),
    decoders: Sequence[str] = DECODERS,
    size: tuple[int, int] = (128, 128),
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Train one step of every combination, with random weights, on a random batch of two images.

    Args:
        names: timm's names of the backbones.
        decoders: Names of decoders.
        size: Height and width of the images in pixels.
        say: Is told a line for each backbone.

    Raises:
        UserError: timm has no such model.
    """
    names = list(names)
    for name in names:
        check_name(name)
    rows = []
    for number, name in enumerate(names, 1):
        row = _row(name, decoders, size)
        rows.append(row)
        trained = [decoder for decoder, reason in row.reasons.items() if not reason]
        say(f"{number}/{len(names)}  {name}: {' '.join(trained) or 'none'} ({row.seconds:.1f} s)")
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Return a table of the rows, and below it the numbered reasons why combinations do not train."""
    if not rows:
        return ""
    decoders = list(rows[0].reasons)
    numbers: dict[str, int] = {}
    lines = [
        "| " + " | ".join(["family", "model", "parameters (M)", *decoders]) + " |",
        "| " + " | ".join(["---", "---", "---:", *["---"] * len(decoders)]) + " |",
    ]
    for row in rows:
        parameters = "" if row.parameters is None else f"{row.parameters / 1e6:.1f}"
        cells = []
        for decoder, reason in row.reasons.items():
            note = _note(reason, row.name, decoder)
            cells.append(f"no ({numbers.setdefault(note, len(numbers) + 1)})" if reason else "yes")
        lines.append("| " + " | ".join([row.family, f"`{row.name}`", parameters, *cells]) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in numbers.items())]) + "\n"


def train_step(backbone: Backbone, decoder: str, size: tuple[int, int]) -> None:
    """Train a new head on the backbone for one step of SGD, and see that all of both learns.

    Args:
        backbone: Whose parameters are changed by the step.
        decoder: A decoder's name, or auto.
        size: Height and width in pixels.

    Raises:
        UserError: The decoder does not suit the backbone, or the step went wrong.
    """
    head = Head(backbone, resolve_decoder(decoder, backbone), CLASSES, WIDTH)
    model = MultiTaskModel(backbone, {"task": head}).train()
    model.zero_grad()  # what the decoder before has left
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    try:
        outputs = model(torch.rand(2, 3, *size))["task"]
        # Refuses outputs that are not of the labels' size.
        loss = functional.cross_entropy(outputs, torch.randint(CLASSES, (2, *size)))
        loss.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found = [f"the error {reason!r}"]
    else:
        optimizer.step()
        found = _problems(model, loss)
    if found:
        raise UserError(
            f"--decoder {decoder} on {backbone.name!r} at {size[0]}x{size[1]} gives {' and '.join(found)}; "
            "choose another of the two"
        )


def _problems(model: MultiTaskModel, loss: Tensor) -> list[str]:
    """Return what is wrong after a step that raised nothing."""
    parameters = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    missing = parameters.keys() - gradients.keys()
    problems = {
        f"a loss of {loss.item()}": not loss.isfinite(),
        "gradients that are not finite": not all(gradient.isfinite().all() for gradient in gradients.values()),
        "weights that are not finite": not all(parameter.isfinite().all() for parameter in parameters.values()),
        f"no gradient for {', '.join(sorted(missing))}": bool(missing),
    }
    for part in ("backbone.", "heads."):
        learns = any(gradient.any() for name, gradient in gradients.items() if name.startswith(part))
        problems[f"gradients of zero in all of {part[:-1]}"] = not learns
    return [problem for problem, present in problems.items() if present]


def _note(reason: str, name: str, decoder: str) -> str:
    """Return a reason as a sentence that other backbones and decoders may share."""
    note = reason.removeprefix("--backbone: ").replace(repr(name), "this backbone")
    note = note.replace(f"--decoder {decoder} ", "this decoder ")
    return re.sub("^th", "Th", note) + "."


def _row(name: str, decoders: Sequence[str], size: tuple[int, int]) -> Row:
    start = time.perf_counter()
    parameters: int | None = None
    reasons: dict[str, str] = dict.fromkeys(decoders, "")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for stride in {encoder_stride(decoder): None for decoder in decoders}:
            alike = [decoder for decoder in decoders if encoder_stride(decoder) == stride]
            try:
                backbone = Backbone(name, size, stride)
            except UserError as error:
                reasons |= dict.fromkeys(alike, str(error))
                continue
            parameters = sum(parameter.numel() for parameter in backbone.parameters())
            for decoder in alike:
                try:
                    train_step(backbone, decoder, size)
                except UserError as error:
                    reasons[decoder] = str(error)
            # timm's models hold references to themselves: without this a large one stays until the next has come.
            del backbone
            gc.collect()
    family = FAMILIES.get(name) or timm.model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]
    return Row(family, name, parameters, reasons, time.perf_counter() - start)
