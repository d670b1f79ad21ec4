"""Narrow networks of the textbook, from their papers: every kind of layer that they have besides plain convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and an activation."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, groups: int = 1,
        act: type[nn.Module] = nn.ReLU,
    ) -> None:  # fmt: skip
        padding = (kernel // 2,) * 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), act(inplace=True) if act is not nn.Identity else act())


class VGG(nn.Module):
    """Configuration A of K. Simonyan, A. Zisserman, 2015, a sixteenth as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2, 2),
            nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2, 2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(True), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(True),
            nn.MaxPool2d(2, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(nn.Linear(144, 24), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class InceptionA(nn.Module):
    """Figure 5 of C. Szegedy et al., "Rethinking the Inception Architecture", 2016: four branches, one of them pooled."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 8, 1)
        self.branch5x5 = nn.Sequential(ConvNorm(inputs, 6, 1), ConvNorm(6, 8, 5))
        self.branch3x3dbl = nn.Sequential(ConvNorm(inputs, 8, 1), ConvNorm(8, 12, 3), ConvNorm(12, 12, 3))
        self.branch_pool = ConvNorm(inputs, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.branch1x1(x), self.branch5x5(x), self.branch3x3dbl(x), pooled], 1)


class InceptionB(nn.Module):
    """Figure 10: a smaller image, one branch of it by pooling alone."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = nn.Sequential(nn.Conv2d(inputs, 12, 3, 2, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.branch7x7 = nn.Sequential(ConvNorm(inputs, 6, (1, 7)), ConvNorm(6, 6, (7, 1)), nn.Conv2d(6, 8, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3x3(x), self.branch7x7(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = ConvNorm(3, 8, 3, 2), nn.MaxPool2d(3, 2)
        self.a, self.b, self.fc = InceptionA(8), InceptionB(32), nn.Linear(52, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.pool(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class DenseLayer(nn.Module):
    """Batch norm and activation come first; every layer sees all before it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.Module):
    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """G. Huang et al., 2017: two blocks and the transition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1))
        self.block1 = DenseBlock(8, 8, 3)
        self.transition = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(True), nn.Conv2d(32, 16, 1), nn.AvgPool2d(2, 2))
        self.block2 = DenseBlock(16, 8, 2)
        self.norm, self.classifier = nn.BatchNorm2d(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.block2(self.transition(self.block1(self.stem(x)))))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(F.relu(x, inplace=True), (1, 1)), 1))


class Squeezed(nn.Module):
    """Squeeze-excite as J. Hu et al. published it: linear layers, views, and an expansion."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class SEBottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(inputs, width, 1), ConvNorm(width, width, 3, stride)
        self.conv3, self.se = ConvNorm(width, outputs, 1, act=nn.Identity), Squeezed(outputs, 4)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = ConvNorm(inputs, outputs, 1, stride, act=nn.Identity)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        return self.relu(self.se(self.conv3(self.conv2(self.conv1(x)))) + residual)


class SEResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 8, 7, 2), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.layers = nn.Sequential(SEBottleneck(8, 8, 24, 1), SEBottleneck(24, 8, 24, 1), SEBottleneck(24, 8, 32, 2))
        self.avg_pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avg_pool(self.layers(self.stem(x))), 1))


class ShuffleUnit(nn.Module):
    """Figure 2 of X. Zhang et al., "ShuffleNet", 2018."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = outputs - inputs if stride == 2 else outputs
        self.reduce, self.shuffle = ConvNorm(inputs, 12, 1, groups=groups), nn.ChannelShuffle(groups)
        self.depthwise = ConvNorm(12, 12, 3, stride, 12, nn.Identity)
        self.expand = ConvNorm(12, branch, 1, groups=groups, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(self.shuffle(self.reduce(x))))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))
        return F.relu(x + y)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = ConvNorm(3, 12, 3, 2), nn.MaxPool2d(3, 2, 1)
        self.units = nn.Sequential(ShuffleUnit(12, 24, 3, 2), ShuffleUnit(24, 24, 3, 1))
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(self.pool(self.stem(x))).mean([2, 3]))


class Excite(nn.Module):
    """Squeeze-excite as mobile networks have it: 1x1 convolutions."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(channels, hidden, 1), nn.SiLU(inplace=True)
        self.conv_expand, self.gate = nn.Conv2d(hidden, channels, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(y))))


class MBConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.expand, self.depthwise = (
            ConvNorm(inputs, wide, 1, act=nn.SiLU),
            ConvNorm(wide, wide, kernel, stride, wide, nn.SiLU),
        )
        self.se, self.project = Excite(wide, max(1, inputs // 4)), ConvNorm(wide, outputs, 1, act=nn.Identity)
        self.joins = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return y + x if self.joins else y


class EfficientNet(nn.Module):
    """M. Tan, Q. Le, 2019: a block of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2, act=nn.SiLU)
        self.blocks = nn.Sequential(MBConv(8, 8, 2, 3, 1), MBConv(8, 12, 3, 5, 2), MBConv(12, 12, 2, 3, 1))
        self.head, self.pool = ConvNorm(12, 40, 1, act=nn.SiLU), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.head(self.blocks(self.stem(x)))).flatten(1))


class UNet(nn.Module):
    """O. Ronneberger et al., 2015, once up by a transposed convolution and once by interpolation; a map of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = ConvNorm(3, 8, 3), ConvNorm(8, 12, 3), ConvNorm(12, 16, 3)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 12, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.merge2, self.merge1 = ConvNorm(24, 12, 3), ConvNorm(20, 8, 3)
        self.out = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.bottom(self.pool(b))
        b = self.merge2(torch.cat([b, self.up2(c)], 1))
        return self.out(self.merge1(torch.cat([a, self.up1(b)], 1)))
