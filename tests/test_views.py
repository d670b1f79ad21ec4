"""Models that call Tensor.view: right in every mode, and channels-last where the view allows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonconv


class Classifier(nn.Module):
    """Tutorials' way from a convolution to a linear layer; `flat` makes rows of the activation."""

    def __init__(self, flat: object, features: int, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.pool = pool or nn.MaxPool2d(2)
        self.fc = nn.Linear(features, 4)
        self.flat = flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.flat(self.pool(torch.relu(self.bn(self.conv(x))))))


class Joining(Classifier):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pool(torch.relu(self.bn(self.conv(x))))
        return self.fc(y.view(y.size(0), -1))


class Branching(Joining):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else -super().forward(-x)


class Shuffling(Classifier):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.fc(self.pool(y).flatten(1))


def same_as_the_original(model: nn.Module) -> nn.Module:
    """The converted model, after both were compared in eval mode and in one training step."""
    x = torch.randn(2, 3, 8, 8)
    converted = tritonconv.convert(model.eval())
    with torch.no_grad():
        assert torch.allclose(converted(x), model(x), atol=1e-5)
    for m in (model.train(), converted.train()):
        m(x).square().sum().backward()
    for (name, ours), theirs in zip(converted.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4), name
    return converted.eval()


def is_channels_last(model: nn.Module) -> bool:
    return bool(model.conv.weight.is_contiguous(memory_format=torch.channels_last))


@pytest.mark.filterwarnings("ignore:tritonconv")
@pytest.mark.parametrize("kind", [Joining, Branching])
def test_views_that_join_channels_and_pixels_keep_activations_contiguous(kind: type[Classifier]) -> None:
    converted = same_as_the_original(kind(None, 72))
    assert not is_channels_last(converted)
    report = tritonconv.explain(converted, torch.randn(2, 3, 8, 8))
    assert "kept contiguous" in str(report) and "Tensor.reshape would do" in str(report)
    # The first layer reads the image in place; only its weight's order would cost a copy, and the flat axis follows it.
    assert report.to_dict()["layers"][0]["copies"] == 0


@pytest.mark.filterwarnings("ignore:tritonconv")
@pytest.mark.parametrize(
    "model",
    [
        lambda: Joining(None, 8, nn.AdaptiveAvgPool2d(1)),
        lambda: Shuffling(None, 72),
        lambda: Classifier(nn.Flatten(), 72),
    ],
    ids=["of a global pool", "that split channels", "none"],
)
def test_other_views_do_not_stand_in_the_way(model: object) -> None:
    converted = same_as_the_original(model())  # type: ignore[operator]
    assert is_channels_last(converted)
    assert "kept contiguous" not in str(tritonconv.explain(converted, torch.randn(2, 3, 8, 8)))


def test_activations_are_channels_last_from_a_first_layer_of_one_channel_on() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5)).eval()
    layers = tritonconv.explain(tritonconv.convert(model), torch.randn(2, 1, 32, 32)).to_dict()["layers"]
    assert [row["copies"] for row in layers] == [0, 0, 0]


def test_convert_and_run_on_meta() -> None:
    model = tritonconv.convert(Classifier(nn.Flatten(), 72).to("meta").eval())
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 4)
