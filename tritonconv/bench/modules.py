"""Blocks and whole models to benchmark: how each is made, who defined it, and what it is fed."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tritonconv.bench import architectures

__all__ = ["MODULES", "OWN", "Factory", "ModuleCase", "Suite", "calibrate_batch_norms", "module_cases"]

Suite = Literal["blocks", "models"]

OWN = "own definition"


@functools.cache
def installed(package: str) -> ModuleType | None:
    """The package, or None where it is missing or does not import."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return None
        reason: Exception = error
    # One made for another torch may raise anything: torchvision's registers operators that it does not find.
    except Exception as error:
        reason = error
    warnings.warn(f"{package} is installed but does not import, so it supplies no models: {reason}", stacklevel=2)
    return None


class Scores(nn.Module):
    """A segmentation model of torchvision that returns its scores and not a dictionary of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


@dataclass(frozen=True)
class Factory:
    """Makes a module, from a library where one that has it imports, else from our own definition; never with weights."""

    own: Callable[[], nn.Module]
    libraries: tuple[tuple[str, Callable[[ModuleType], nn.Module]], ...] = ()
    """Packages that have the same module, the preferred one first, and how it is made from them."""

    def __call__(self, *, own: bool = False) -> nn.Module:
        for package, make in () if own else self.libraries:
            library = installed(package)
            if library is not None:
                return make(library)
        return self.own()

    def provider(self, *, own: bool = False) -> str:
        """Whose definition a call with the same argument returns: a package with its version, or "own definition"."""
        for package, _ in () if own else self.libraries:
            library = installed(package)
            if library is not None:
                return f"{package} {library.__version__}"
        return OWN


@dataclass(frozen=True)
class ModuleCase:
    """One module to benchmark: how to make it, and what it is fed."""

    name: str
    suite: Suite
    make: Callable[..., nn.Module]
    """Without arguments: a module with random weights, in training mode, that takes one tensor and returns one. A Factory
    also takes `own=True`, for our own definition whatever is installed."""
    input: tuple[int, ...]
    """One image's size, without the batch."""
    batches: tuple[int, int]
    """What is inferred at once: one image, and as many as a server would take."""
    train_batch: int
    source: str
    """The paper, and what of it where that leaves a choice."""

    def images(self, batch: int, **tensor_options: Any) -> Tensor:
        """Random images (batch, *input), with torch.randn's options: dtype, device, generator.

        >>> MODULES["r3d_18"].images(2, device="meta", dtype=torch.float16).shape
        torch.Size([2, 3, 16, 112, 112])
        """
        return torch.randn(batch, *self.input, **tensor_options)

    def provider(self, *, own: bool = False) -> str:
        """Who defined what `make` returns when called with the same argument; results must say it.

        >>> MODULES["unet"].provider()
        'own definition'
        """
        return self.make.provider(own=own) if isinstance(self.make, Factory) else OWN


def published(own: Callable[[], nn.Module], torchvision: str, timm: str) -> Factory:
    """A classifier under its names in both libraries."""
    return Factory(
        own,
        (
            ("torchvision", lambda library: getattr(library.models, torchvision)(weights=None)),
            ("timm", lambda library: library.create_model(timm, pretrained=False)),
        ),
    )


def _deeplab(library: ModuleType) -> nn.Module:
    # Its backbone's weights would be downloaded by default.
    options: dict[str, Any] = dict(weights=None, weights_backbone=None, num_classes=21, aux_loss=False)
    return Scores(library.models.segmentation.deeplabv3_resnet50(**options))


# Large batches are round numbers whose 16-bit activations, with what training keeps of them, fit into 40 GB.
CASES = [
    ModuleCase(
        "conv_bn_relu", "blocks", Factory(architectures.conv_bn_relu),
        (256, 14, 14), (1, 256), 256, "arXiv:1512.03385, the 3x3 convolution of ResNet-50's third stage",
    ),
    ModuleCase(
        "bottleneck", "blocks", Factory(architectures.bottleneck),
        (1024, 14, 14), (1, 256), 256, "arXiv:1512.03385, ResNet-50's third stage",
    ),
    ModuleCase(
        "inverted_residual", "blocks", Factory(architectures.inverted_residual),
        (32, 28, 28), (1, 256), 256, "arXiv:1801.04381, MobileNetV2's third stage",
    ),
    ModuleCase(
        "separable", "blocks", Factory(architectures.separable),
        (512, 14, 14), (1, 256), 256, "arXiv:1704.04861, MobileNet's five equal blocks",
    ),
    ModuleCase(
        "unet_stage", "blocks", Factory(architectures.unet_stage),
        (512, 128, 128), (1, 16), 16, "arXiv:1505.04597, padded and with batch norm, from the third level to the second",
    ),
    ModuleCase(
        "resnet50", "models", published(architectures.resnet50, "resnet50", "resnet50"),
        (3, 224, 224), (1, 256), 256, "arXiv:1512.03385, strides in the 3x3 convolutions",
    ),
    ModuleCase(
        "resnext50_32x4d", "models", published(architectures.resnext50_32x4d, "resnext50_32x4d", "resnext50_32x4d"),
        (3, 224, 224), (1, 256), 256, "arXiv:1611.05431",
    ),
    ModuleCase(
        "mobilenet_v2", "models", published(architectures.mobilenet_v2, "mobilenet_v2", "mobilenetv2_100"),
        (3, 224, 224), (1, 256), 256, "arXiv:1801.04381",
    ),
    ModuleCase(
        "efficientnet_b0", "models", published(architectures.efficientnet_b0, "efficientnet_b0", "efficientnet_b0"),
        (3, 224, 224), (1, 256), 256, "arXiv:1905.11946",
    ),
    ModuleCase(
        "convnext_tiny", "models", published(architectures.convnext_tiny, "convnext_tiny", "convnext_tiny"),
        (3, 224, 224), (1, 128), 128, "arXiv:2201.03545",
    ),
    ModuleCase(
        "deeplabv3_resnet50", "models", Factory(architectures.deeplabv3_resnet50, (("torchvision", _deeplab),)),
        (3, 513, 513), (1, 16), 16, "arXiv:1706.05587, output stride 8, 21 classes, no auxiliary head",
    ),
    ModuleCase(
        "unet", "models", Factory(architectures.unet),
        (3, 512, 512), (1, 16), 16, "arXiv:1505.04597, padded and with batch norm, 2 classes",
    ),
    ModuleCase(
        "r3d_18", "models",
        Factory(architectures.r3d_18, (("torchvision", lambda library: library.models.video.r3d_18(weights=None)),)),
        (3, 16, 112, 112), (1, 64), 64, "arXiv:1711.11248, 400 classes",
    ),
]  # fmt: skip

MODULES: dict[str, ModuleCase] = {case.name: case for case in CASES}


def module_cases(suite: Suite) -> list[ModuleCase]:
    """The cases of one suite, in the order in which results list them.

    Raises:
        ValueError: `suite` is neither "blocks" nor "models".

    >>> [case.name for case in module_cases("blocks")]
    ['conv_bn_relu', 'bottleneck', 'inverted_residual', 'separable', 'unet_stage']
    """
    if suite not in get_args(Suite):
        raise ValueError(f"suite must be one of {', '.join(get_args(Suite))}, got {suite!r}")
    return [case for case in CASES if case.suite == suite]


def calibrate_batch_norms(model: nn.Module, images: Tensor) -> nn.Module:
    """The same model, whose batch norms now have the statistics of these images, as those of a trained one would.

    With the statistics that it starts with, an untrained network in eval mode fades or grows layer by layer: EfficientNet
    gives all images the same scores to five digits, and whatever computes them would look right.

    Args:
        model: any module of images.
        images: a batch of at least two.

    Returns:
        `model` itself, in the mode it was in.

    >>> model = calibrate_batch_norms(nn.Sequential(nn.BatchNorm2d(1)), torch.full((2, 1, 4, 4), 3.0))
    >>> model.training, model[0].running_mean.tolist(), model[0].momentum
    (True, [3.0], 0.1)
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    momenta = [norm.momentum for norm in norms]
    # Everything else stays as it is in eval mode: no branch is dropped.
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        with torch.no_grad():
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return model
