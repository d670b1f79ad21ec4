"""What a rewritten graph computes: a rewrite fires only where it gives the same, whatever ranks, axes and windows are."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matrix import rotate
from torch import Tensor, nn

import tritonconv
import tritonconv.functional as TF
from tritonconv.graph.translate import functions
from tritonconv.ops.core.launch import record_launches


def same(model: nn.Module, x: Tensor, training: bool = True) -> nn.Module:
    """The converted model, once it gave the same as the original in eval mode and in training, gradients too."""
    converted = tritonconv.convert(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5, equal_nan=True)
    if not training:
        return converted
    original, trained = copy.deepcopy(model).train(), copy.deepcopy(converted).train()
    results = original(x), trained(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, equal_nan=True)
    for y in results:
        y.square().sum().backward()
    for (name, theirs), ours in zip(original.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name, equal_nan=True)
    return converted


class Behind(nn.Module):
    """A convolution with its batch norm and activation, and any function of the result and the input."""

    def __init__(self, body: Callable[[Tensor, Tensor], Tensor], nd: int = 2, bare: bool = False) -> None:
        super().__init__()
        self.conv = getattr(nn, f"Conv{nd}d")(3, 4, 3, padding=1)
        self.bn = nn.Identity() if bare else getattr(nn, f"BatchNorm{nd}d")(4)
        self.act = nn.Identity() if bare else nn.ReLU()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.act(self.bn(self.conv(x))), x)


PIXELS = (-2, -1)
MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Frames of a video.
    "view": lambda y, _: y.view(2, 2, 4, 5, 6).mean(PIXELS),
    "unflatten": lambda y, _: y.unflatten(0, (-1, 2)).mean(dim=PIXELS),
    "reshape": lambda y, _: y.reshape(2, 2, *y.shape[1:]).mean(PIXELS),
    "one channel": lambda y, _: y[:, 0].mean(PIXELS),
    "one image": lambda y, _: y[0].mean(PIXELS),
    "select": lambda y, _: y.select(1, 0).mean(PIXELS),
    "stack": lambda y, _: torch.stack([y, y], 1).mean(PIXELS),
    "groups": lambda y, _: y.view(4, 2, 2, 5, 6).mean((2, 3)),
    "sum": lambda y, _: y.sum(1).mean(PIXELS),
    "max": lambda y, _: y.max(1)[0].mean(PIXELS),
    "amax": lambda y, _: torch.amax(y, 1).mean(PIXELS),
    "squeeze": lambda y, _: y[:1].squeeze(0).mean(PIXELS),
    "unsqueeze": lambda y, _: y.unsqueeze(1).mean(PIXELS),
    "torch.mean": lambda y, _: torch.mean(y.unsqueeze(0), PIXELS),
    "torch.mean by name": lambda y, _: torch.mean(input=y[:, 1], dim=PIXELS),
    "image, permuted": lambda y, _: y.permute(0, 2, 3, 1).mean(PIXELS),
    "a sum of more axes": lambda y, x: (y[:, :3] + x.unsqueeze(0)).mean(PIXELS),
    # Of images, where the kernel is to run.
    "image": lambda y, _: y.mean(PIXELS),
    "image by (2, 3)": lambda y, _: y.mean((2, 3)),
    "image, keepdim": lambda y, _: y.mean([3, 2], keepdim=True),
    "image, torch.mean": lambda y, _: torch.mean(y, dim=(2, 3)),
}


@rotate(bare=[False, True], name=MEANS)
def test_means_over_the_axes_that_are_written(name: str, bare: bool) -> None:
    converted = same(Behind(MEANS[name], bare=bare), torch.randn(4, 3, 5, 6), training=not bare)
    with torch.no_grad(), record_launches() as log:
        converted(torch.randn(4, 3, 5, 6))
    # The convolution's own sums, or a kernel for the average.
    assert any("average" in kernel or "global" in kernel for kernel in log) == name.startswith("image"), log


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("nd", [1, 2, 3])
def test_means_of_unbatched_images(nd: int, keepdim: bool) -> None:
    size = (5, 4, 3)[:nd]
    for shape in ((3, *size), (2, 3, *size)):
        same(Behind(lambda y, _: y.mean(tuple(range(-nd, 0)), keepdim), nd, bare=True), torch.randn(shape))


POOLS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    # Windows of padding alone.
    "relu, 2-d dilated": (nn.ReLU(), nn.MaxPool2d(3, 6, 1, 2, ceil_mode=True), (1, 2, 1, 24)),
    "leaky relu, 2-d dilated": (nn.LeakyReLU(0.0), nn.MaxPool2d(3, 6, 1, 2, ceil_mode=True), (1, 2, 1, 24)),
    "relu, 1-d dilated": (nn.ReLU(), nn.MaxPool1d(2, 5, 1, 3), (1, 1, 2)),
    "relu6, 3-d dilated": (nn.ReLU6(), nn.MaxPool3d(2, 1, 1, 3), (1, 1, 2, 2, 2)),
    "hardtanh, 1-d dilated": (nn.Hardtanh(), nn.MaxPool1d(3, 1, 1, 2), (2, 1, 3)),
    # Where a maximum may go first.
    "relu": (nn.ReLU(), nn.MaxPool2d(3, 2, 1), (2, 3, 7, 5)),
    "relu, rounded up": (nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 3, 6, 5)),
    "leaky relu": (nn.LeakyReLU(0.1), nn.MaxPool2d(2), (2, 3, 6, 4)),
}


@pytest.mark.parametrize("name", POOLS)
def test_an_activation_before_a_maximum(name: str) -> None:
    act, pool, shape = POOLS[name]
    x = torch.randn(shape)
    model = nn.Sequential(act, pool).eval()
    same_values = tritonconv.convert(model)
    with torch.no_grad():
        assert torch.equal(same_values(x), model(x))
        # Infinities, and NaN.
        x.view(-1)[::3] = float("-inf")
        x.view(-1)[1] = float("nan")
        torch.testing.assert_close(same_values(x), model(x), rtol=0, atol=0, equal_nan=True)


def test_no_window_without_dilation_lies_in_the_padding_alone() -> None:
    for kernel in range(1, 6):
        for padding in range(kernel // 2 + 1):
            for stride in range(1, 8):
                for size in range(1, 9):
                    for ceil_mode in (False, True):
                        if size + 2 * padding >= kernel:
                            y = F.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, 1, ceil_mode)
                            assert y.eq(0).all(), (kernel, padding, stride, size, ceil_mode)


def calls(function: Callable[..., Any], arguments: tuple[Any, ...], tensors: int) -> nn.Module:
    """A module whose forward calls the function with so many inputs, and then these arguments."""
    names = ", ".join(f"x{i}" for i in range(tensors))
    scope = {"function": function, "arguments": arguments}
    exec(f"def forward(self, {names}): return function({names}, *arguments)", scope)
    return type("Calls", (nn.Module,), {"forward": scope["forward"]})()


def arguments_for(name: str) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Inputs and numbers for one of torch's functions."""
    nd = next((int(c) for c, d in itertools.pairwise(name) if c in "123" and d == "d"), 2)
    x = torch.randn(2, 4, *(6, 4, 4)[:nd])
    if name.startswith("conv_transpose"):
        return (x, torch.randn(4, 3, *(2,) * nd)), ()
    if name.startswith("conv"):
        return (x, torch.randn(3, 4, *(2,) * nd)), ()
    if name == "linear":
        return (torch.randn(2, 4), torch.randn(3, 4)), ()
    if name.startswith("max_unpool"):
        y, index = getattr(F, f"max_pool{nd}d")(x, 2, return_indices=True)
        return (y, index), (2,)
    if name.startswith("lp_pool"):
        return (x,), (2, 2)
    if name.startswith("adaptive"):
        return (x,), (2,)
    if "pool" in name or "shuffle" in name:
        return (x,), (2,)
    if name == "batch_norm":
        return (x, torch.rand(4), torch.rand(4) + 1), ()
    if name == "group_norm":
        return (x,), (2,)
    if name == "layer_norm":
        return (x,), ((4,),)
    if name == "instance_norm":
        return (x,), ()
    if name == "interpolate":
        return (x,), (None, 2)
    raise AssertionError(f"no arguments for {name}")


@pytest.mark.parametrize("theirs", functions(), ids=lambda f: f"{getattr(f, '__module__', None) or 'torch'}.{f.__name__}")
def test_each_function_is_replaced_by_one_with_its_results(theirs: Callable[..., Any]) -> None:
    tensors, numbers = arguments_for(theirs.__name__.removeprefix("native_").replace("_with_indices", ""))
    model = calls(theirs, numbers, len(tensors)).eval()
    converted = tritonconv.convert(model)
    expected, actual = model(*tensors), converted(*tensors)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_torchs_adaptive_max_pool1d_gives_a_pair() -> None:
    assert functions()[torch.adaptive_max_pool1d] is TF.adaptive_max_pool1d_with_indices
    assert functions()[F.adaptive_max_pool1d] is TF.adaptive_max_pool1d


class Padded(nn.Module):
    """A convolution, with its norm and activation, of an image that a function pads."""

    def __init__(self, pad: Callable[[Tensor], Tensor], conv: nn.Module) -> None:
        super().__init__()
        self.pad, self.conv = pad, conv
        self.norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[conv.weight.dim()](conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(self.pad(x))))


PADDED: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {
    "both sides": (lambda x: F.pad(x, (1, 1, 2, 2)), nn.Conv2d(4, 6, 3)),
    "behind": (lambda x: F.pad(x, (0, 1, 0, 1)), nn.Conv2d(4, 6, 3, 2)),
    "before the columns": (lambda x: F.pad(x, (2, 0)), nn.Conv2d(4, 6, 3, padding=(1, 0), dilation=2)),
    "zeros of a module": (nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(4, 6, 3, padding=1, groups=2)),
    "a single tap": (lambda x: F.pad(x, (0, 1, 0, 2), value=0.0), nn.Conv2d(4, 6, 1)),
    "filters that tile the image": (lambda x: F.pad(x, (0, 1, 1, 0)), nn.Conv2d(4, 6, 2, 2, padding="valid")),
    "depthwise": (lambda x: F.pad(x, [0, 1, 0, 1], "constant", 0), nn.Conv2d(4, 4, 3, 2, groups=4)),
    "1-d": (nn.ConstantPad1d((3, 0), 0.0), nn.Conv1d(4, 6, 4)),
    "3-d": (lambda x: F.pad(x, (0, 0, 1, 0, 2, 1)), nn.Conv3d(4, 6, (3, 2, 1))),
}
KEPT: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {
    "other values": (lambda x: F.pad(x, (0, 1), value=1.0), nn.Conv2d(4, 6, 3)),
    "reflected": (lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), nn.Conv2d(4, 6, 3)),
    "pixels removed": (lambda x: F.pad(x, (-1, 1)), nn.Conv2d(4, 6, 3)),
    "channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)), nn.Conv2d(5, 6, 3)),
    "a convolution that pads by name": (lambda x: F.pad(x, (0, 1)), nn.Conv2d(4, 6, 3, padding="same")),
}


@pytest.mark.parametrize("name", [*PADDED, *KEPT])
def test_zeros_around_an_image_become_the_convolutions_own(name: str) -> None:
    pad, conv = (PADDED | KEPT)[name]
    x = torch.randn(2, 4, *(7, 6, 5)[: conv.weight.dim() - 2])
    converted = same(Padded(pad, conv), x)
    rows = [row.reason for row in tritonconv.explain(converted.eval(), x).layers if row.backend == "torch"]
    with torch.no_grad(), record_launches() as launches, torch.autograd.profiler.profile() as profile:
        converted(x)
    assert len(launches) == 1 and not rows
    assert any(event.name == "aten::pad" for event in profile.function_events) == (name in KEPT)


def test_padded_values_that_others_read_stay() -> None:
    model = Behind(lambda y, _: y, bare=True)
    model.body = lambda y, _: model.conv(padded := F.pad(y[:, :3], (0, 1))) + padded.sum()
    same(model, torch.randn(2, 3, 5, 6))


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 0, 1, 1)])
def test_functions_take_no_zeros_for_each_side(padding: tuple[int, ...]) -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    for convolution in (F.conv2d, TF.conv2d):
        with pytest.raises(RuntimeError, match="padding"):
            convolution(x, w, padding=padding)


def in_place(y: Tensor, z: Tensor) -> Tensor:
    y += z
    return F.relu(y, inplace=True)


def from_zero(y: Tensor, z: Tensor) -> Tensor:
    total: Any = 0
    for part in (y, z):
        total = part + total
    return F.relu(total)


class Branches(nn.Module):
    """Sums of branches, as in re-parametrized networks: a convolution and the norm of the input itself."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.own, self.join = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
            join,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.norm(self.conv(x)), self.own(x))


@rotate(first=[False, True], join=[in_place, from_zero])
def test_sums_of_branches_are_two_launches(join: Callable[[Tensor, Tensor], Tensor], first: bool) -> None:
    model = Branches((lambda a, b: join(b, a)) if first else join)
    x = torch.randn(2, 4, 6, 6)
    converted = same(model, x)
    with torch.no_grad(), record_launches() as launches:
        converted.eval()(x)
    assert len(launches) == 2 and all(row.backend == "triton" for row in tritonconv.explain(converted, x).layers)


def test_a_sum_into_a_value_that_others_read_is_seen_by_them() -> None:
    def join(y: Tensor, z: Tensor) -> Tensor:
        kept = z.view(2, -1)
        z += y
        return F.relu(z) + kept.view_as(z)

    same(Branches(join), torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "body", [lambda y: torch.stack([y, y], 1).sum(1), lambda y: y.reshape(*y.shape[:2], -1).view_as(y)]
)
def test_stacks_and_views_of_the_same_size_copy_nothing(body: Callable[[Tensor], Tensor], batch: int) -> None:
    model = Behind(lambda y, _: body(y), nd=1)
    x = torch.randn(batch, 3, 8)
    converted = same(model, x)
    # What enters, and what leaves.
    assert tritonconv.explain(converted.eval(), x).totals["copies"] <= 2


def test_views_as_another_dtype_stay() -> None:
    model = Behind(lambda y, _: y.view(torch.int32).float(), nd=1)
    x = torch.randn(2, 3, 8)
    assert tritonconv.convert(model.eval())(x).max() == model(x).max() > 1e6
