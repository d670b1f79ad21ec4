"""What several architectures are made of."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["ReLU", "Residual", "StochasticDepth", "classifier", "conv_bn", "initialize"]

Activation = Callable[[], nn.Module]

# In place, as it is usually written: torch's own training then keeps one image less for each layer.
ReLU: Activation = functools.partial(nn.ReLU, inplace=True)


def conv_bn(
    inputs: int, outputs: int, size: int = 1, *, stride: int = 1, dilation: int = 1, groups: int = 1,
    activation: Activation | None = ReLU,
) -> nn.Sequential:  # fmt: skip
    """A 2-D convolution padded to keep the image's size, batch norm, activation.

    >>> [type(layer).__name__ for layer in conv_bn(8, 16, 3, activation=None)]
    ['Conv2d', 'BatchNorm2d']
    """
    padding = dilation * (size // 2)
    layers = [
        nn.Conv2d(inputs, outputs, size, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


class Residual(nn.Module):
    """activation(body(x) + shortcut(x)), where a missing part does nothing."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = y + (x if self.shortcut is None else self.shortcut(x))
        return y if self.activation is None else self.activation(y)


class StochasticDepth(nn.Module):
    """Drops a residual branch for some images while training, and scales it up for the others (Huang et al. 2016).

    >>> import torch
    >>> StochasticDepth(0.5).eval()(torch.ones(2, 1, 1, 1)).flatten().tolist()
    [1.0, 1.0]
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


def classifier(
    trunk: nn.Module, channels: int, classes: int, *, pool: nn.Module | None = None, dropout: float = 0.0
) -> nn.Sequential:
    """The trunk, averaged over its pixels, and a linear layer over its channels."""
    return nn.Sequential(
        OrderedDict(
            trunk=trunk,
            pool=nn.AdaptiveAvgPool2d(1) if pool is None else pool,
            flatten=nn.Flatten(),
            dropout=nn.Dropout(dropout),
            classifier=nn.Linear(channels, classes),
        )
    )


def initialize(model: nn.Module) -> nn.Module:
    """The same model with random weights whose outputs have the size of its inputs, layer by layer (He et al. 2015).

    torch's default shrinks activations in every layer: after fifty, results of different backends would agree for want
    of anything to disagree on.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            # nn.init.kaiming_normal_ takes a grouped convolution's outputs for those of each of its groups.
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
