"""Models of five libraries with random weights, made small where their configurations allow it, and inputs for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Model", "declare_operators"]

Model = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
"""Makes a model, and the arguments of a call."""


def declare_operators() -> None:
    """Let torchvision be imported beside a torch without CUDA: its package from PyPI cannot load its operators there."""
    if torch.version.cuda is None and importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def image(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


def timm(name: str, size: int = 64, **options: Any) -> Model:
    def make() -> Any:
        import timm as library

        return library.create_model(name, **options), (image(size),), {}

    return make


def transformers(kind: str, config: dict[str, Any], inputs: Callable[[], dict[str, Any]] = lambda: {}) -> Model:
    """A model of the class `kind`, with its default configuration but for `config`."""

    def make() -> Any:
        import transformers as library

        cls = getattr(library, kind)
        model = cls(cls.config_class(**config))
        return model, (), inputs() or {"pixel_values": image(64)}

    return make


def diffusers(kind: str, config: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Model:
    def make() -> Any:
        import diffusers as library

        return getattr(library, kind)(**config), (), inputs()

    return make


def ultralytics(name: str) -> Model:
    def make() -> Any:
        from ultralytics import RTDETR, YOLO

        return (RTDETR if "rtdetr" in name else YOLO)(name + ".yaml").model, (image(64),), {}

    return make


def segmentation(kind: str, encoder: str = "resnet18", size: int = 64) -> Model:
    def make() -> Any:
        import segmentation_models_pytorch as library

        return getattr(library, kind)(encoder, encoder_weights=None), (image(size),), {}

    return make


VAE = dict(
    block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip
UNET = dict(
    block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
FRAMES = dict(block_out_channels=(32, 64, 64, 64), layers_per_block=1, norm_num_groups=8)


def conditioned() -> dict[str, Any]:
    return dict(sample=image(16, 4), timestep=torch.tensor([3, 4]), encoder_hidden_states=torch.randn(2, 5, 32))


TIMM = [
    "resnet18", "resnet50", "resnext50_32x4d", "seresnet18", "skresnet18", "resnest14d", "res2net50_26w_4s",
    "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small", "mnasnet_100", "fbnetc_100", "lcnet_050",
    "efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnet_cc_b0_4e", "tf_efficientnetv2_b0", "mixnet_s", "tinynet_e",
    "ghostnet_100", "rexnet_100", "densenet121", "dla34", "hrnet_w18_small", "regnety_002", "regnetx_002", "repvgg_a0",
    "mobileone_s0", "repghostnet_050", "vgg11_bn", "cspresnet50", "cs3darknet_m", "ese_vovnet19b_dw", "selecsls42b",
    "gernet_s", "convnext_atto", "convnextv2_atto", "inception_next_atto", "resnetv2_50", "nf_resnet50", "eca_nfnet_l0",
    "fastvit_t8", "efficientformer_l1", "poolformer_s12", "levit_conv_128s", "starnet_s1", "repvit_m0_9", "pvt_v2_b0",
    "mambaout_femto", "xception41", "edgenext_xx_small", "mobilevit_xxs", "coatnet_pico_rw_224", "botnet26t_256",
]  # fmt: skip
SIZES = {
    "inception_v3": 96,
    "efficientformer_l1": 224,
    "levit_conv_128s": 224,
    "coatnet_pico_rw_224": 224,
    "botnet26t_256": 256,
}

SEGMENTERS = ("Unet", "UnetPlusPlus", "DeepLabV3Plus", "FPN", "PSPNet", "Linknet", "MAnet")

MODELS: dict[str, dict[str, Model]] = {
    "timm": {name: timm(name, SIZES.get(name, 64)) for name in [*TIMM, "inception_v3"]},
    "transformers": {
        "resnet": transformers("ResNetForImageClassification", dict(depths=[1, 1, 1, 1], hidden_sizes=[64, 64, 96, 128])),
        "regnet": transformers("RegNetForImageClassification", dict(depths=[1, 1, 2, 1], hidden_sizes=[64, 128, 192, 256])),
        "mobilenet_v1": transformers("MobileNetV1ForImageClassification", {}),
        "mobilenet_v2": transformers("MobileNetV2ForImageClassification", {}),
        "mobilevit": transformers("MobileViTForImageClassification", {}),
        "convnext": transformers(
            "ConvNextForImageClassification", dict(depths=[1, 1, 2, 1], hidden_sizes=[32, 48, 64, 96])
        ),
        "bit": transformers("BitForImageClassification", dict(depths=[1, 1, 1, 1], hidden_sizes=[128, 128, 256, 256])),
        "segformer": transformers("SegformerForSemanticSegmentation", {}),
        "poolformer": transformers("PoolFormerForImageClassification", {}),
        "levit": transformers("LevitForImageClassification", {}, lambda: {"pixel_values": image(224)}),
        "superpoint": transformers("SuperPointForKeypointDetection", {}, lambda: {"pixel_values": image(64)}),
        "wav2vec2": transformers(
            "Wav2Vec2Model",
            dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64),
            lambda: {"input_values": torch.randn(1, 2000)},
        ),
        "encodec": transformers("EncodecModel", dict(num_filters=8), lambda: {"input_values": torch.randn(1, 1, 1280)}),
        "dac": transformers(
            "DacModel",
            dict(encoder_hidden_size=16, decoder_hidden_size=128),
            lambda: {"input_values": torch.randn(1, 1, 2048)},
        ),
        "hifigan": transformers(
            "SpeechT5HifiGan", dict(upsample_initial_channel=64), lambda: {"spectrogram": torch.randn(20, 80)}
        ),
        "mamba": transformers(
            "MambaModel",
            dict(vocab_size=50, hidden_size=32, num_hidden_layers=2),
            lambda: {"input_ids": torch.arange(8)[None]},
        ),
    },
    "diffusers": {
        "autoencoder_kl": diffusers("AutoencoderKL", VAE, lambda: {"sample": image(32)}),
        "autoencoder_tiny": diffusers("AutoencoderTiny", {}, lambda: {"sample": image(32)}),
        "vq_model": diffusers(
            "VQModel", VAE | dict(latent_channels=3, norm_num_groups=8), lambda: {"sample": image(32)}
        ),
        "unet_2d": diffusers(
            "UNet2DModel",
            dict(
                block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ),
            lambda: dict(sample=image(32), timestep=torch.tensor([3, 4])),
        ),
        "unet_2d_condition": diffusers("UNet2DConditionModel", UNET, conditioned),
        "controlnet": diffusers(
            "ControlNetModel",
            {k: v for k, v in UNET.items() if k != "up_block_types"},
            lambda: conditioned() | dict(controlnet_cond=image(128)),
        ),
        "autoencoder_oobleck": diffusers(
            "AutoencoderOobleck",
            dict(encoder_hidden_size=16, decoder_channels=16, decoder_input_channels=8, channel_multiples=[1, 2, 2, 4, 4]),
            lambda: {"sample": torch.randn(1, 2, 4096)},
        ),
        "autoencoder_cogvideox": diffusers(
            "AutoencoderKLCogVideoX",
            dict(
                block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=4, latent_channels=4,
                sample_height=32, sample_width=32,
            ),
            lambda: {"sample": torch.randn(1, 3, 5, 32, 32)},
        ),
    },
    "ultralytics": {
        name: ultralytics(name) for name in ("yolov5n", "yolov8n", "yolov8n-seg", "yolov9t", "yolov10n", "yolo11n")
    },
    "segmentation_models_pytorch": {
        **{kind.lower(): segmentation(kind) for kind in SEGMENTERS},
        "pan": segmentation("PAN", size=256),
        "unet_mobilenet_v2": segmentation("Unet", "mobilenet_v2"),
        "unet_densenet121": segmentation("Unet", "densenet121"),
    },
}  # fmt: skip
