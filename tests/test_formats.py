"""Memory formats that callers and a model's own code see: those of the original, whatever lies between its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import helpers_of_forwards as helpers
import pytest
import torch
import torch.nn.functional as F
from matrix import every, rotate, some
from torch import Tensor, nn

import tritonconv
from tritonconv.ops.core.layout import dense_strides, suggests_channels_last


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for item in items for t in tensors_in(item)]


def compared(model: nn.Module, *inputs: Tensor, training: bool = True) -> nn.Module:
    """The converted model, once values and strides were the original's, in eval mode and in one training step."""
    converted = tritonconv.convert(model.eval())
    with torch.no_grad():
        for theirs, ours in zip(tensors_in(model(*inputs)), tensors_in(converted(*inputs)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, check_stride=True)
    if training:
        original, trained = copy.deepcopy(model).train(), copy.deepcopy(converted).train()
        results = [tensors_in(m(*inputs)) for m in (original, trained)]
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, check_stride=True)
        for each in results:
            torch.stack([y.square().sum() for y in each if y.is_floating_point()]).sum().backward()
        for (name, p), q in zip(original.named_parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)
    return converted


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Classifier(nn.Module):
    """Tutorials' way from convolutions to a linear layer; classes below differ in how they make rows of activations."""

    def __init__(self, pool: nn.Module | None = None, features: int = 72) -> None:
        super().__init__()
        self.conv, self.bn, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.pool = pool or nn.MaxPool2d(2)
        self.fc = nn.Linear(features, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.conv2(torch.relu(self.bn(self.conv(x))))))

    def rows(self, y: Tensor) -> Tensor:
        return y.view(y.size(0), -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rows(self.features(x)))


class ByHelper(Classifier):
    def rows(self, y: Tensor) -> Tensor:
        return helpers.flat(y)


class ByStaticMethod(Classifier):
    @staticmethod
    def rows(y: Tensor) -> Tensor:
        return y.view(len(y) if y.dim() == 1 else y.size(0), -1)


class ByProperty(Classifier):
    @property
    def flattening(self) -> Callable[[Tensor], Tensor]:
        return lambda y: y.view(y.size(0), -1)

    def rows(self, y: Tensor) -> Tensor:
        return self.flattening(y)


class ByName(Classifier):
    def rows(self, y: Tensor) -> Tensor:
        return getattr(y, "vi" + "ew")(y.size(0), -1)


class ByLambda(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.flat = Lambda(lambda x: x.view(x.size(0), -1))

    def rows(self, y: Tensor) -> Tensor:
        return self.flat(y)


class ByViewAs(Classifier):
    def rows(self, y: Tensor) -> Tensor:
        return y.view_as(torch.zeros(y.size(0), 72))


class ByStrides(Classifier):
    def rows(self, y: Tensor) -> Tensor:
        return y.as_strided((y.size(0), 72), (72, 1))


class Branching(Classifier):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 1e9 else -super().forward(-x)


class InAnUntracedBlock(nn.Module):
    """A block that cannot be traced between layers that can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Views()
        self.head = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(self.block(y) + y)


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1).view(x.shape) if x.sum() < 1e9 else x


class WithHook(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), 8)
        self.seen: list[Tensor] = []
        self.conv2.register_forward_hook(lambda _, args, y: (args[0].view(-1), y.view(y.size(0), -1))[1].view(y.shape))


class NormAndActivation(nn.BatchNorm2d):
    """A subclass of a layer, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ViewsRows(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(x.size(0), -1).view(x.shape)


class WithSubclasses(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.pool = NormAndActivation(8), nn.Sequential(ViewsRows(8), nn.MaxPool2d(2))


class Shuffling(Classifier):
    def rows(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        return super().rows(y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w))


VIEWING = [
    Classifier, ByHelper, ByStaticMethod, ByProperty, ByName, ByLambda, ByViewAs, ByStrides, Branching, Shuffling,
    WithHook, WithSubclasses, InAnUntracedBlock,
]  # fmt: skip


@rotate(kind=VIEWING, format=[torch.contiguous_format, torch.channels_last])
def test_a_view_sees_the_memory_that_torch_gives_it(kind: type[nn.Module], format: torch.memory_format) -> None:
    model, x = kind(), torch.randn(2, 3, 8, 8).contiguous(memory_format=format)
    try:
        model(x)
    except RuntimeError as error:
        # Where torch refuses the view, ours does.
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            tritonconv.convert(model)(x)
        return
    converted = compared(model, x, training=format == torch.contiguous_format)
    assert all(suggests_channels_last(m.weight) for m in converted.modules() if isinstance(m, nn.Conv2d))


def test_between_layers_activations_are_channels_last() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.Flatten()
    ).eval()
    layers = tritonconv.explain(tritonconv.convert(model), torch.randn(2, 1, 32, 32)).to_dict()["layers"]
    assert [row["copies"] for row in layers] == [0, 0, 0, 0]


def test_explain_counts_the_copy_of_a_result() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    for x, copies in (
        (torch.randn(1, 3, 8, 8), 1),
        (torch.randn(1, 3, 8, 8).contiguous(memory_format=torch.channels_last), 0),
    ):
        layers = tritonconv.explain(tritonconv.convert(model), x).to_dict()["layers"]
        assert [row["copies"] for row in layers] == [0, copies]


class Body(nn.Module):
    """Two convolutions a and b, and any function of them and the input."""

    def __init__(self, body: Callable[[Any, Tensor], Any], nd: int = 2) -> None:
        super().__init__()
        kind: Any = getattr(nn, f"Conv{nd}d")
        self.a, self.b = kind(4, 6, 3, padding=1), kind(6, 6, 3, padding=1)
        self.bn, self.act = getattr(nn, f"BatchNorm{nd}d")(6), nn.ReLU()
        self.body = body

    def block(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.a(x)))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


BODIES: dict[str, Callable[[Any, Tensor], Any]] = {
    "one layer": lambda m, x: m.a(x),
    "a chain": lambda m, x: m.b(m.block(x)),
    "features": lambda m, x: (lambda y: [y, m.b(y), {"pooled": F.max_pool2d(y, 2)}])(m.block(x)),
    "a view": lambda m, x: m.b(m.block(x)).view(-1),
    "rows": lambda m, x: m.block(x).view(x.size(0), -1),
    "permuted": lambda m, x: m.block(x).permute(0, 2, 3, 1),
    "permuted back": lambda m, x: m.b(m.block(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
    "from channels-last": lambda m, x: m.b(m.block(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))),
    "transposed pixels": lambda m, x: m.b(m.block(x).transpose(2, 3)),
    "a slice": lambda m, x: m.block(x)[:, 1:3],
    "a slice of a slice": lambda m, x: m.block(x)[:, 1:][:, :, 1:],
    "chunks": lambda m, x: m.block(x).chunk(2, 1),
    "chunks used": lambda m, x: torch.cat([t.relu() for t in m.b(m.block(x)).chunk(2, 1)], 1),
    "a chunk changed in place": lambda m, x: [t.add_(1) for t in m.b(x.new_ones(2, 6, 5, 6)).chunk(2, 1)],
    "an index": lambda m, x: m.block(x)[0],
    "a row of pixels": lambda m, x: m.block(x)[:, :, 0],
    "strided": lambda m, x: m.block(x)[..., ::2],
    "as_strided": lambda m, x: m.block(x).as_strided((3, 4), (4, 1)),
    "complex": lambda m, x: torch.view_as_complex(m.block(x).view(2, 6, 5, 3, 2)),
    "reduced": lambda m, x: (lambda y: [y.sum(1), y.mean(1, True), y.amax((2, 3)), y.max(1)[0]])(m.block(x)),
    "averaged": lambda m, x: m.block(x).mean((2, 3), True),
    "averaged, and more": lambda m, x: (lambda y: [y, y.mean((2, 3), True), y.mean((2, 3))])(m.block(x)),
    "pooled": lambda m, x: F.adaptive_avg_pool2d(m.block(x), 1),
    "softmax": lambda m, x: m.b(m.block(x)).softmax(1),
    "interpolated": lambda m, x: F.interpolate(m.block(x), scale_factor=2),
    "frames": lambda m, x: m.b(m.block(x).view(1, 2, 6, 5, 6).flatten(0, 1)),
    "frames, averaged": lambda m, x: m.b(m.block(x)).unflatten(0, (-1, 2)).mean((-2, -1)),
    "concatenated": lambda m, x: torch.cat([m.block(x), m.b(m.block(x))], 1),
    "a residual of two ways": lambda m, x: m.b(m.block(x)) + m.b(m.block(x).view(2, 6, 5, 6)),
    "changed in place behind a view": lambda m, x: (lambda y: (y.view(-1), y.add_(1)))(m.b(m.block(x))),
    "a view changed in place": lambda m, x: (lambda y: (y.view(2, -1).mul_(2), y))(m.b(m.block(x))),
    "the input": lambda m, x: [x, x[:, 1:], m.block(x)],
    "contiguous as it is": lambda m, x: m.b(m.block(x)).transpose(1, 1).contiguous(),
    "its own format": lambda m, x: m.b(m.block(x)).contiguous(memory_format=torch.channels_last),
    "numbers": lambda m, x: (lambda y: y.reshape(y.shape[0] * y.size(1), y.shape[2] * y.size(3) // 2, 2))(m.block(x)),
}  # fmt: skip
IN_PLACE = {name for name in BODIES if "in place" in name}


@rotate(format=[torch.contiguous_format, torch.channels_last], name=BODIES)
def test_results_have_the_strides_that_torch_gives(name: str, format: torch.memory_format) -> None:
    model, x = Body(BODIES[name]), torch.randn(2, 4, 5, 6).contiguous(memory_format=format)
    try:
        model(x)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            tritonconv.convert(model)(x)
        return
    # The rules are one mode's as the other's: training takes the format that costs copies.
    compared(model, x, training=format == torch.contiguous_format and name not in IN_PLACE | {"complex"})


@rotate(
    weights=[torch.contiguous_format, torch.channels_last],
    name=["one layer", "a chain", "features", "a slice", "a residual of two ways"],
)
def test_channels_last_weights_of_the_original_give_channels_last_results(name: str, weights: torch.memory_format) -> None:
    model = Body(BODIES[name]).to(memory_format=weights)
    converted = compared(model, torch.randn(2, 4, 5, 6))
    y = tensors_in(converted(torch.randn(2, 4, 5, 6)))[0]
    if name == "a chain":
        assert suggests_channels_last(y) == (weights == torch.channels_last)


@rotate(nd=[1, 3], name=["one layer", "a chain", "rows", "a slice", "an index"])
def test_in_one_and_three_dimensions_too(name: str, nd: int) -> None:
    compared(Body(BODIES[name], nd), torch.randn(2, 4, *(3, 4, 5)[:nd]))


def test_a_view_of_a_1d_result() -> None:
    compared(Body(lambda m, x: m.b(m.block(x)).view(-1), 1), torch.randn(2, 4, 7))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_layer_on_its_own(kind: type[nn.Module]) -> None:
    layer = kind(4, 6, 3)
    for x in (
        torch.randn(2, 4, 5, 6),
        torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 5, 6),
    ):
        converted = compared(layer, x)
        assert suggests_channels_last(converted.weight)


def test_a_result_of_one_pixel_has_contiguous_strides() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    y = compared(model, torch.randn(2, 3, 8, 8))(torch.randn(2, 3, 8, 8))
    assert y.stride() == dense_strides((2, 8, 1, 1), False)


class Projects(nn.Module):
    """Looks at its convolution's weight as at a matrix."""

    def __init__(self, rows: Callable[[nn.Conv2d], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.rows = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), rows
        self.other = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.other(torch.relu(self.bn(self.conv(x)))), self.rows(self.conv).square().sum()


class ProjectsUntraced(Projects):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, total = super().forward(x if x.sum() < 1e9 else -x)
        return y, total + self.conv.weight.view(8, -1).sum()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    "model",
    [
        lambda: Projects(lambda conv: conv.weight.view(conv.out_channels, -1)),
        lambda: Projects(helpers.rows_of),
        lambda: ProjectsUntraced(helpers.rows_of),
    ],
    ids=["a lambda", "a helper", "untraced"],
)
def test_a_weight_that_the_forward_views_keeps_its_strides(model: Callable[[], nn.Module], fuse: bool) -> None:
    original, x = model().eval(), torch.randn(1, 3, 7, 7)
    converted = tritonconv.convert(original, fuse=fuse)
    with torch.no_grad():
        for ours, theirs in zip(converted(x), original(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert converted.conv.weight.is_contiguous()


def test_convert_and_run_on_meta() -> None:
    model = tritonconv.convert(Classifier().to("meta").eval())
    with pytest.warns(UserWarning, match="tensors on meta run on torch"):
        assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 4)


@every(name=some(["a chain", "features", "a slice", "rows"], 1))
def test_compiled_models_give_the_same_strides(name: str) -> None:
    model, x = Body(BODIES[name]).eval(), torch.randn(2, 4, 5, 6)
    converted = tritonconv.convert(model)
    with torch.no_grad():
        compiled = torch.compile(converted, backend="aot_eager")(x)
        for ours, theirs in zip(tensors_in(compiled), tensors_in(model(x)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, check_stride=True)
