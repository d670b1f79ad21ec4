"""Which deformable layers and calls of other libraries convert takes for its own: those that it knows to the letter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deform_reference import deform_reference
from reference import assert_close
from test_deform_rules import make
from torch import Tensor

import tritonconv
from tritonconv.convert.deform import KNOWN, digest_of_forward
from tritonconv.graph.translate import translate
from tritonconv.nn import DeformConv2d, DeformConv2dPack
from tritonconv.ops.core.family import call_family
from tritonconv.ops.core.launch import record_launches
from tritonconv.ops.core.layout import is_dense


class Packed(torch.nn.Module):
    """A modulated layer as mmcv packs it, by its paper; not mmcv's code."""

    def __init__(self, c: int = 4, k: int = 6, groups: int = 2) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size, self.groups = c, k, (3, 3), 1
        self.stride, self.padding, self.dilation, self.deform_groups = 1, 1, 1, groups
        self.weight, self.bias = torch.nn.Parameter(torch.randn(k, c, 3, 3)), torch.nn.Parameter(torch.randn(k))
        self.conv_offset = torch.nn.Conv2d(c, 3 * groups * 9, 3, padding=1)

    def sample(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return deform_reference(x, offset, self.weight, self.bias, 1, 1, 1, mask).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.conv_offset(x).chunk(3, 1)
        return self.sample(x, torch.cat((first, second), 1), mask.sigmoid())


class TwiceTheMask(Packed):
    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.conv_offset(x).chunk(3, 1)
        return self.sample(x, torch.cat((first, second), 1), 2 * mask.sigmoid())


class SoftmaxMask(Packed):
    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.conv_offset(x).chunk(3, 1)
        return self.sample(x, torch.cat((first, second), 1), mask.softmax(1))


class BoundedOffsets(Packed):
    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.conv_offset(x).chunk(3, 1)
        return self.sample(x, torch.cat((first, second), 1).tanh().clamp(-0.5, 0.5), mask.sigmoid())


class WithResidual(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[:, :1]


class DetachedOffsets(Packed):
    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.conv_offset(x.detach()).chunk(3, 1)
        return self.sample(x, torch.cat((first, second), 1), mask.sigmoid())


def belongs_to(kind: type[torch.nn.Module], package: str, name: str) -> type[torch.nn.Module]:
    """The class, under the name of one in another library."""
    return type(name, (kind,), {"__module__": f"{package}.ops.deform_conv", "forward": kind.forward})


def test_convert_knows_layers_of_torchvision_and_mmcv(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(torch.nn.Module):
        __init__, __repr__, reset_parameters = DeformConv2d.__init__, DeformConv2d.__repr__, DeformConv2d.reset_parameters

        def forward(self: Any, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
            return deform_reference(input, offset, self.weight, self.bias, mask=mask).to(input.dtype)

    # Stand-ins: their forwards are known here as those of the libraries' releases are known to the package.
    for package, name, kind, twin in (
        ("torchvision", "DeformConv2d", Theirs, DeformConv2d),
        ("mmcv", "ModulatedDeformConv2dPack", Packed, DeformConv2dPack),
    ):
        monkeypatch.setitem(KNOWN, (package, name, digest_of_forward(kind.forward)), twin)
    theirs = belongs_to(Theirs, "torchvision", "DeformConv2d")
    layer: Any = torch.nn.Module.__new__(theirs)
    torch.nn.Module.__init__(layer)
    layer.in_channels, layer.out_channels, layer.groups, layer.kernel_size = 4, 6, 1, (2, 2)
    layer.stride, layer.padding, layer.dilation = (1, 1), (0, 0), (1, 1)
    layer.weight, layer.bias = torch.nn.Parameter(torch.randn(6, 4, 2, 2)), torch.nn.Parameter(torch.randn(6))
    pack = belongs_to(Packed, "mmcv", "ModulatedDeformConv2dPack")
    packed: Any = pack()
    x, offset, *_, mask = make(c=4)
    model = torch.nn.ModuleDict(dict(layer=layer, packed=packed))
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = layer(x, offset, mask).double(), packed(x).double()
        tritonconv.convert(model, inplace=True)
        assert type(layer) is DeformConv2d and type(packed) is DeformConv2dPack and list(model.state_dict()) == keys
        with record_launches() as launches:
            assert_close(layer(x, offset, mask), expected[0], depth=16)
            assert_close(packed(x), expected[1], depth=36)
        assert launches.count("deform_conv_kernel") == 2
        assert is_dense(layer.weight, True)
        tritonconv.revert(model)
    assert type(layer) is theirs and type(packed) is pack and is_dense(layer.weight, False)
    # Other offsets, other parameters: theirs stay.
    packed.conv_offset = torch.nn.Conv2d(4, 3 * 2 * 9, 3, padding=1, stride=2)
    layer.extra = torch.nn.Parameter(torch.zeros(1))
    tritonconv.convert(model, inplace=True)
    assert type(layer) is theirs and type(packed) is pack


@pytest.mark.parametrize("kind", [TwiceTheMask, SoftmaxMask, BoundedOffsets, WithResidual, DetachedOffsets, Packed])
@pytest.mark.parametrize(
    ("package", "name"), [("mmcv", "ModulatedDeformConv2dPack"), ("mmcv", "DCNv2"), ("mine", "ModulatedDeformConv2dPack")]
)
def test_convert_leaves_layers_alone_whose_forward_it_does_not_know(
    kind: type[Packed], package: str, name: str
) -> None:  # fmt: skip
    layer = belongs_to(kind, package, name)()
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    converted = tritonconv.convert(layer)
    assert type(converted) is type(layer)
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
    (ours,) = torch.autograd.grad(converted(x).square().sum(), x)
    torch.testing.assert_close(converted(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_digest_of_a_forward_leaves_out_comments_and_annotations() -> None:
    class Annotated:
        def forward(self, x: Tensor) -> Tensor:
            """Says what it does."""
            # And why.
            return x.relu()

    class Bare:
        def forward(self, x):  # type: ignore[no-untyped-def]
            return x.relu()

    class Other:
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() + 1

    digests = [digest_of_forward(kind.forward) for kind in (Annotated, Bare, Other)]
    assert digests[0] == digests[1] != digests[2]
    assert digest_of_forward(torch.relu) == ""


def test_convert_finds_calls_of_torchvisions_function() -> None:
    def deform_conv2d(*_arguments: Any, **_named: Any) -> Tensor:
        raise AssertionError("torchvision's function was called")

    deform_conv2d.__module__ = "torchvision.ops.deform_conv"
    graph = torch.fx.Graph()
    tensors = make(c=4)[:3]
    x, offset, weight = (graph.placeholder(name) for name in ("x", "offset", "weight"))
    for node, value in zip((x, offset, weight), tensors, strict=True):
        node.meta["example_value"] = value
    call = graph.call_function(deform_conv2d, (x, offset, weight), dict(stride=(1, 1)))

    def operator(*_arguments: Any) -> Tensor:
        raise AssertionError("torchvision's operator was called")

    operator.__name__, operator.namespace = "deform_conv2d", "torchvision"  # type: ignore[attr-defined]
    again = graph.call_function(operator, (x, weight, offset, None, None, 1, 1, 0, 0, 1, 1, 1, 1, False))
    graph.output((call, again))
    translate(graph)
    assert len(graph.find_nodes(op="call_function", target=call_family)) == 2
    ours = torch.fx.GraphModule(torch.nn.Module(), graph)(*tensors)
    assert torch.equal(*ours)
    assert_close(ours[0], deform_reference(*tensors), depth=16)
