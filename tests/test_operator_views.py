"""Registered operators of views: fake results have the real ones' strides, and nothing is read as if it were dense."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz.views import Input
from matrix import rotate
from torch import Tensor

import tritonconv

pytestmark = pytest.mark.usefixtures("on_triton")

OPS: Any = torch.ops.tritonconv
VIEWS = ("channels_last step", "channels_last slice", "step", "slice", "permute", "expand", "odd ones")
CONV = dict(stride=[1], padding=[1], padding_name="", dilation=[1], groups=1)
NORM = dict(eps=1e-3, activation="", a=0.0, b=0.0)
WINDOW = ([2], [2], [0], [1], False)
MORE = dict(kind="max", power=1.0, divisor=None, include_pad=True)
Make = Callable[..., Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def image(t: Make) -> Tensor:
    return t(2, 4, 6, 5)


def places(*shape: int) -> Tensor:
    """A position in a plane for each of its values, all different."""
    return torch.arange(shape[-1] * shape[-2]).view(shape[-2:]).expand(shape).contiguous()


# Everything that is registered, with arguments that `t` makes views of.
CASES: dict[str, Callable[[Make], Arguments]] = {
    "conv": lambda t: ((image(t), t(6, 4, 3, 3), t(6), t(6), t(6).abs(), t(6), t(6), t(2, 6, 6, 5)),
                       CONV | NORM | dict(kind="conv")),
    "conv_dgrad": lambda t: ((t(2, 6, 6, 5), t(6, 4, 3, 3)),
                             CONV | dict(input_shape=[2, 4, 6, 5], channels_last=True, kind="conv")),
    "conv_wgrad": lambda t: ((t(2, 6, 6, 5), image(t)),
                             CONV | dict(weight_shape=[6, 4, 3, 3], channels_last=False, bias=True, kind="conv")),
    "conv_transpose": lambda t: ((image(t), t(4, 6, 3, 3), None, *(None,) * 4, None),
                                 NORM | dict(stride=[2], padding=[1], output_padding=[0], groups=1, dilation=[1])),
    "conv_batch_norm": lambda t: ((image(t), t(6, 4, 3, 3), None, None, None, t(6), t(6), t(2, 6, 6, 5)),
                                  CONV | NORM | dict(transposed=False, output_padding=[], group="")),
    "conv_batch_norm_backward": lambda t: (
        (t(2, 6, 6, 5), image(t), t(6, 4, 3, 3), t(2, 6, 6, 5).contiguous(), t(6), t(6).abs() + 1, None, t(6), t(6), None),
        CONV | NORM | dict(needs=[True] * 5 + [False], input_shape=[2, 4, 6, 5], weight_shape=[6, 4, 3, 3],
                           channels_last=[True, False], transposed=False, output_padding=[], group=""),
    ),
    "conv_activation_backward": lambda t: (
        (t(2, 6, 6, 5), image(t), t(6, 4, 3, 3), t(2, 6, 6, 5).contiguous(), torch.eye(5)[:, 1:2].repeat(1, 6)),
        CONV | dict(needs=[True] * 4, input_shape=[2, 4, 6, 5], weight_shape=[6, 4, 3, 3], channels_last=[True, False],
                    transposed=False, output_padding=[], kind="conv", activation="relu", a=0.0, b=0.0),
    ),
    "separable": lambda t: (
        (image(t), t(4, 1, 3, 3), *(None,) * 5, t(6, 4, 1, 1), *(None,) * 5, t(2, 6, 6, 5)),
        NORM | dict(stride=[1], padding=[1], padding_name="", dilation=[1], first_eps=1e-3, first_activation="relu",
                    first_a=0.0, first_b=0.0),
    ),
    "deform_conv2d": lambda t: ((image(t), t(6, 4, 1, 1), t(6), *(None,) * 4, t(2, 2, 6, 5), t(2, 1, 6, 5), t(2, 6, 6, 5)),
                                NORM | dict(stride=[1], padding=[0], dilation=[1])),
    "deform_conv2d_backward": lambda t: ((t(2, 6, 6, 5), image(t), t(6, 4, 1, 1), t(2, 2, 6, 5), t(2, 1, 6, 5)),
                                         dict(needs=[True] * 5, stride=[1], padding=[0], dilation=[1])),
    "batch_norm_train": lambda t: ((image(t), t(4), t(4), t(2, 4, 6, 5)), NORM | dict(group="")),
    "batch_norm_eval": lambda t: ((image(t), t(4), t(4).abs(), t(4), t(4), t(2, 4, 6, 5)), NORM),
    "batch_norm_backward": lambda t: (
        (t(2, 4, 6, 5), image(t), t(4), t(4).abs() + 1, torch.full((1,), 60.0), t(4), t(4), None),
        NORM | dict(group="", needs_x=True, needs_weight=True, needs_bias=True, needs_residual=False),
    ),
    "group_norm": lambda t: ((image(t), t(4), t(4), t(2, 4), t(2, 4), t(2, 4, 6, 5)), NORM | dict(groups=2)),
    "group_norm_backward": lambda t: (
        (t(2, 4, 6, 5), image(t), t(4), t(4), t(2, 4), t(2, 4), t(2, 4, 6, 5), torch.rand(3, 4)),
        NORM | dict(groups=2, activation="silu", needs_x=True, needs_weight=True, needs_bias=True, needs_scale=True,
                    needs_shift=True, needs_residual=True),
    ),
    "update_instance_stats": lambda t: ((torch.rand(3, 8), t(4), t(4), 0.1, 30), {}),
    "update_running_stats": lambda t: ((torch.rand(4), torch.rand(4), torch.full((1,), 9.0), t(4), t(4), 0.1), {}),
    "pool": lambda t: ((image(t), *WINDOW), MORE | dict(indices="flat", activation="", a=0.0, b=0.0)),
    "pool_backward": lambda t: ((t(2, 4, 3, 2), places(2, 4, 3, 2), None, None, [2, 4, 6, 5], *WINDOW),
                                MORE | dict(channels_last=True)),
    "max_unpool": lambda t: ((t(2, 4, 3, 2), places(2, 4, 3, 2), [6, 5]), {}),
    "max_unpool_backward": lambda t: ((image(t), places(2, 4, 3, 2), True), {}),
    "adaptive_avg_pool": lambda t: ((image(t), [2, 3]), {}),
    "adaptive_avg_pool_backward": lambda t: ((t(2, 4, 2, 3), [2, 4, 6, 5], True), {}),
    "adaptive_max_pool": lambda t: ((image(t), [2, 3], True), {}),
    "adaptive_max_pool_backward": lambda t: ((t(2, 4, 2, 3), places(2, 4, 2, 3), [2, 4, 6, 5], False), {}),
    "global_average": lambda t: ((image(t), True), {}),
    "stochastic_pool": lambda t: ((image(t), torch.rand(2, 4, 3, 2), [2, 2], [2, 2], [0, 0], False), {}),
    "stochastic_pool_backward": lambda t: (
        (t(2, 4, 3, 2), torch.zeros(2, 4, 3, 2, dtype=torch.uint8), None, None, [2, 4, 6, 5], [2, 2], [2, 2], [0, 0], False,
         True), {}),
    "resample": lambda t: ((image(t), [9, 7], [], "linear"), {}),
    "resample_backward": lambda t: ((t(2, 4, 9, 7), [2, 4, 6, 5], [], "nearest", True), {}),
    "pixel_shuffle": lambda t: ((image(t), 2), {}),
    "pixel_unshuffle": lambda t: ((t(2, 4, 6, 4), 2), {}),
    "channel_shuffle": lambda t: ((image(t), 2), {}),
    "scale_channels": lambda t: ((image(t), t(2, 4, 1, 1)), {}),
    "scale_channels_backward": lambda t: ((t(2, 4, 6, 5), image(t), t(2, 4, 1, 1), True, True), {}),
    "causal_conv1d": lambda t: ((t(2, 4, 6), t(4, 3), t(4), t(2, 4, 2)), dict(activation="silu", a=0.0, b=0.0)),
    "causal_conv1d_backward": lambda t: ((t(2, 4, 6), t(2, 4, 6), t(4, 3), t(4), t(2, 4, 2)),
                                         dict(activation="silu", a=0.0, b=0.0)),
    "causal_conv1d_update": lambda t: ((t(2, 4, 1), t(2, 4, 2), t(4, 3), t(4)), dict(activation="", a=0.0, b=0.0)),
}  # fmt: skip
# What an operator writes may not be expanded: torch itself refuses that.
WRITES = ("update_running_stats", "update_instance_stats", "causal_conv1d_update")


def arguments(name: str, layout: str) -> Arguments:
    r = random.Random(f"{name} {layout}")

    def view(*shape: int) -> Tensor:
        axes = None if layout == "expand" else tuple(range(len(shape)))
        given = Input(shape, layout, values="integers" if name == "stochastic_pool" else "normal", axes=axes)
        given.make(r, torch.float32)
        return given.view

    return CASES[name](view)


def test_every_registered_operator_is_here() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tritonconv::")}
    assert names == set(CASES)


@rotate(layout=VIEWS, name=CASES)
def test_fake_results_lie_as_the_real_ones(name: str, layout: str) -> None:
    if layout == "expand" and name in WRITES:
        layout = "permute"
    positional, keywords = arguments(name, layout)
    operator = getattr(OPS, name).default
    torch.library.opcheck(operator, positional, keywords, test_utils=("test_schema", "test_faketensor"))


@rotate(name=[name for name in CASES if name not in WRITES], layout=VIEWS)
def test_views_give_what_dense_tensors_give(name: str, layout: str) -> None:
    positional, keywords = arguments(name, layout)
    dense = [t.contiguous() if isinstance(t, Tensor) else t for t in positional]
    found, expected = (getattr(OPS, name)(*given, **keywords) for given in (positional, dense))
    for out, ref in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, expected)), strict=True):
        assert torch.allclose(out.double(), ref.double(), rtol=1e-5, atol=1e-5, equal_nan=True), layout


CHANNELS_LAST_RESULTS = [
    ("adaptive_avg_pool2d", (2,)), ("adaptive_avg_pool2d", (1,)), ("adaptive_max_pool2d_with_indices", (3,)),
    ("max_pool2d", (2,)), ("max_pool2d_with_indices", (2,)), ("avg_pool2d", (2,)), ("interpolate", (4, None, "nearest")),
    ("interpolate", (4, None, "bilinear")), ("interpolate", (4, None, "area")), ("adaptive_avg_pool1d", (2,)),
    ("batch_norm", (None, None, None, None, True)), ("group_norm", (2,)), ("instance_norm", ()),
]  # fmt: skip


@pytest.mark.parametrize("needs_gradient", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("name, numbers", CHANNELS_LAST_RESULTS, ids=lambda v: v if isinstance(v, str) else "")
def test_results_of_channels_last_views_lie_as_torchs(name: str, numbers: tuple[Any, ...], needs_gradient: bool) -> None:
    x = torch.randn(2, 5, 6, 8)[:, :, : 1 if name.endswith("1d") else 6].permute(0, 3, 1, 2)[:, ::2]
    x = (x.squeeze(3) if name.endswith("1d") else x).detach().requires_grad_(needs_gradient)
    with torch.set_grad_enabled(needs_gradient):
        ours = getattr(tritonconv.functional, name)(x, *numbers)
        theirs = getattr(torch.nn.functional, name)(x, *numbers)
    for out, ref in zip(*(t if isinstance(t, tuple) else (t,) for t in (ours, theirs)), strict=True):
        assert out.stride() == ref.stride() and torch.allclose(out, ref, atol=1e-5)
