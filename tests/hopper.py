"""Launches of Hopper's kernels in the Gluon interpreter, and what torch computes in fp64 in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
import torch
from gluon_interpreter import Random, Timed, run
from reference import assert_close
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.hopper import hopper_convolution, hopper_dgrad, hopper_wgrad
from tritonconv.ops.conv.target import WHOLE, Result, Target
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Launch, captured, forced
from tritonconv.ops.core.layout import empty_output
from tritonconv.tuning import device_named

__all__ = [
    "BF16", "FP16", "HOPPER", "ON_CPU", "SEEDS", "Layer", "bits", "channels_last", "check", "descriptors",
    "execute", "forward", "interpreted", "of_every_seed", "reference", "reference_gradients",
]  # fmt: skip

# So few multiprocessors that programs walk several tiles.
HOPPER = replace(device_named("H200"), multiprocessors=3)
SEEDS = range(3)
FP16, BF16 = torch.float16, torch.bfloat16
# The interpreter's tensors are torch's on the CPU, and kernels behind a workspace run in Triton's interpreter.
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="Hopper's kernels are interpreted on the CPU")

NOTHING = Epilogue()

Value = TypeVar("Value")


def execute(launches: Sequence[Launch], seed: int | None = 0) -> None:
    """Run captured launches in their order: Gluon's in its interpreter, Triton's in Triton's own.

    Args:
        seed: of the order of events; None for that of the interpreter's clock.
    """
    for one in launches:
        if one.kernel.fn.__module__.startswith("tritonconv.kernels.hopper"):
            schedule = Timed() if seed is None else Random(seed)
            run(one.kernel, one.programs, one.arguments, schedule, num_warps=one.options["num_warps"])
        else:
            one.kernel[(one.programs,)](**one.arguments, **one.options)


def interpreted(call: Callable[[], Value], *, config: Any = None, seed: int | None = 0) -> Value:
    """What a call returns, after its launches have run; until then conftest's poison is in what it allocated."""
    with captured(HOPPER) as launches, forced(config=config):
        result = call()
    execute(launches, seed)
    return result


def descriptors(one: Launch, of: str = "") -> list[Any]:
    """A launch's descriptors, or those of the tensor whose arguments begin with this letter, by phases."""
    return [v for name, v in one.arguments.items() if name.startswith(of) and isinstance(v, TensorDescriptor)]


def bits(t: Tensor) -> Tensor:
    """Elements as integers: NaN equals NaN, and zeros have signs."""
    return t.view(torch.int16 if t.element_size() == 2 else torch.int32)


def of_every_seed(call: Callable[[], Tensor], *, config: Any = None, seeds: Sequence[int | None] = SEEDS) -> Tensor:
    """The result of a call, which every order of events must give, bit for bit."""
    first, *others = (interpreted(call, config=config, seed=seed) for seed in seeds)
    for seed, other in zip(seeds[1:], others, strict=True):
        assert torch.equal(bits(first), bits(other)), f"seed {seed} differs from seed {seeds[0]}"
    return first


def channels_last(t: Tensor) -> Tensor:
    """A copy that is channels-last and nothing else, also of a single channel or pixel."""
    return empty_output(t, tuple(t.shape), True, t.dtype).copy_(t)


def pads(g: ConvGeometry) -> tuple[int, ...]:
    """A convolution's padding as torch.nn.functional.pad takes it."""
    axes = list(zip(g.padding, g.padding_after, strict=True))[3 - g.nd :]
    return tuple(size for axis in reversed(axes) for size in axis)


def reference(x: Tensor, weight: Tensor, g: ConvGeometry, epilogue: Epilogue = NOTHING) -> Tensor:
    """A convolution or a transposed one, and what follows, by torch in fp64."""
    wide, first = epilogue.map(Tensor.double), 3 - g.nd
    x, weight, stride, dilation = x.double(), weight.double(), g.stride[first:], g.dilation[first:]
    if g.transposed:
        conv = getattr(torch.nn.functional, f"conv_transpose{g.nd}d")
        y = conv(x, weight, wide.bias, stride, g.padding[first:], g.output_padding[first:], g.groups, dilation)
    else:
        conv = getattr(torch.nn.functional, f"conv{g.nd}d")
        y = conv(torch.nn.functional.pad(x, pads(g)), weight, wide.bias, stride, 0, dilation, g.groups)
    return wide.torch(y)


def reference_gradients(x: Tensor, weight: Tensor, dy: Tensor, g: ConvGeometry) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's input and weight by torch in fp64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    dx, dw = torch.autograd.grad(reference(x, weight, g), (x, weight), dy.double())
    return dx, dw


@dataclass(frozen=True)
class Layer:
    """One layer; `why` says what it shows."""

    why: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry.parse(self.input, self.weight, nd=len(self.input) - 2, **self.arguments)

    def tensors(self, dtype: torch.dtype, *, integers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Channels-last input, weight and gradient of the output; small integers where results must be exact."""

        def values(shape: tuple[int, ...]) -> Tensor:
            t = torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3) if integers else torch.randn(shape)
            return channels_last(t.to(dtype))

        return values(self.input), values(self.weight), values(self.geometry.output_shape)


def forward(
    x: Tensor, weight: Tensor, g: ConvGeometry, epilogue: Epilogue = NOTHING, *, slots: list[Tensor] | None = None,
    target: Target = WHOLE,
) -> Tensor:  # fmt: skip
    """A convolution, or a transposed one, to be interpreted.

    Args:
        slots: gets the counts and the moments of statistics, poisoned as results are; None: there are none.
        target: where the result goes.
    """
    result = hopper_convolution(x, weight, epilogue, g, target._replace(statistics=slots is not None))
    assert isinstance(result, Result) and result.y is not None, result
    assert (result.statistics is None) == (slots is None)
    if slots is not None and result.statistics is not None:
        slots += result.statistics
    return result.y


def check(layer: Layer, dtype: torch.dtype, *, config: Any = None, seeds: Sequence[int] = SEEDS) -> None:
    """Forward pass and both gradients of a layer under several orders of events against fp64."""
    g = layer.geometry
    x, weight, dy = layer.tensors(dtype)
    wide_dx, wide_dw = reference_gradients(x, weight, dy, g)
    y = of_every_seed(lambda: forward(x, weight, g), config=config, seeds=seeds)
    assert_close(y, reference(x, weight, g), depth=g.gemm("fprop")[2], what=f"{layer} forward")
    dx = of_every_seed(lambda: hopper_dgrad(dy, weight, g), config=config, seeds=seeds)
    assert_close(dx, wide_dx, depth=g.gemm("dgrad")[2], what=f"{layer} data gradient")
    dw = of_every_seed(lambda: hopper_wgrad(dy, x, g, True), config=config, seeds=seeds)
    assert_close(dw, wide_dw, depth=g.gemm("wgrad")[2], what=f"{layer} weight gradient")
