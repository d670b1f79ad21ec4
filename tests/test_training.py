"""Convolution, batch norm, residual and activation in training, as one operator: every gradient against fp64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from calls import recorded
from cases import DTYPES
from matrix import cover, every, named, rotate, some
from reference import assert_close
from torch import Tensor
from tritonconv.kernels import conv_dgrad, conv_flat, conv_fprop, conv_wgrad, matmul

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.batch_norm import launch as batch_norm
from tritonconv.ops.batch_norm.launch import Statistics
from tritonconv.ops.conv.dense import convolve_dense
from tritonconv.ops.conv.gradients import NormGradient
from tritonconv.ops.conv.gradients import conv_dgrad as launch_dgrad
from tritonconv.ops.conv.gradients import conv_wgrad as launch_wgrad
from tritonconv.ops.conv.target import Target
from tritonconv.ops.core.activation import ActivationSpec, parse_activation
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import device_of, forced, record_launches
from tritonconv.ops.core.layout import as_format
from tritonconv.tuning import Problem
from tritonconv.tuning.candidates import possible


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


@dataclass(frozen=True)
class Block:
    """One layer in training."""

    why: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    activation: str | None = "silu"
    residual: bool = False
    bias: bool = False
    affine: bool = True
    transposed: bool = False

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    @property
    def nd(self) -> int:
        return len(self.input) - 2

    @property
    def channels(self) -> int:
        return self.weight[1] * self.arguments.get("groups", 1) if self.transposed else self.weight[0]

    @property
    def conv(self) -> str:
        return f"conv{'_transpose' if self.transposed else ''}{self.nd}d"


BLOCKS = [
    Block("3x3", (2, 64, 7, 6), (24, 64, 3, 3), dict(padding=1)),
    Block("3x3 strided with a bias", (2, 24, 9, 7), (17, 24, 3, 3), dict(padding=1, stride=2), bias=True),
    Block("1x1", (2, 40, 5, 7), (24, 40, 1, 1)),
    Block("1x1 strided", (2, 24, 7, 6), (40, 24, 1, 1), dict(stride=2), activation=None),
    Block("1x1 with a residual", (2, 24, 5, 5), (24, 24, 1, 1), residual=True),
    Block("1x1 padded", (1, 24, 5, 5), (24, 24, 1, 1), dict(padding=1)),
    Block("residual and no activation", (2, 8, 5, 5), (12, 8, 3, 3), activation=None, residual=True),
    Block("no affine parameters", (2, 8, 6, 5), (12, 8, 3, 3), affine=False, residual=True),
    Block("grouped and dilated", (2, 16, 9, 9), (24, 8, 3, 3), dict(padding=2, dilation=2, groups=2)),
    Block("stem", (2, 3, 15, 13), (10, 3, 7, 7), dict(padding=3, stride=2), activation="relu"),
    Block("1-d", (3, 6, 19), (9, 6, 5), dict(padding="same"), residual=True),
    Block("3-d", (2, 4, 4, 5, 3), (6, 4, 3, 2, 3), dict(padding=1), activation="hardswish"),
    Block("one channel", (2, 1, 5, 5), (1, 1, 3, 3)),
    Block("one pixel an image", (9, 8, 3, 3), (5, 8, 3, 3)),
    Block("transposed 2x2", (2, 12, 5, 4), (12, 8, 2, 2), dict(stride=2), residual=True, transposed=True),
    Block("transposed 3x3", (2, 8, 5, 4), (8, 6, 3, 3), dict(stride=2, padding=1, output_padding=1), transposed=True),
]
THREE, ONE, RESIDUAL = (named(BLOCKS, name) for name in ("3x3", "1x1", "1x1 with a residual"))
GRADCHECK = ("3x3 strided with a bias", "1x1 with a residual", "1-d", "transposed 2x2")
NAMES = ("x", "weight", "bias", "bn_weight", "bn_bias", "residual")
Leaves = dict[str, Tensor | None]


def make(block: Block, dtype: torch.dtype, device: str, channels_last: bool = True) -> tuple[Leaves, Tensor]:
    """Tensors of the layer by name, batch norm's in fp32 at least, and a gradient of its output."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        t = torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)
        return as_format(t, channels_last) if t.dim() > 2 else t

    x, weight = random(*block.input), random(*block.weight)
    shape = getattr(torch.nn.functional, block.conv)(x.double(), weight.double(), None, **block.arguments).shape
    k = block.channels
    leaves: Leaves = dict(
        x=x, weight=weight, bias=random(k) if block.bias else None,
        bn_weight=(torch.rand(k, device=device) + 0.5).to(wide) if block.affine else None,
        bn_bias=torch.randn(k, device=device).to(wide) if block.affine else None,
        residual=random(*shape) if block.residual else None,
    )  # fmt: skip
    # Sums of it do not cancel.
    return leaves, random(*shape) + 1


def ours(block: Block, leaves: Leaves, running: tuple[Tensor | None, ...] = (None, None), fixed: bool = False) -> Tensor:
    x, weight, bias, bn_weight, bn_bias, residual = (leaves[name] for name in NAMES)
    function = getattr(TF, f"{block.conv}_bn_act")
    result: Tensor = function(
        x, weight, bias, *running, bn_weight, bn_bias, **block.arguments, training=not fixed, momentum=0.2, eps=1e-4,
        activation=block.activation, residual=residual,
    )  # fmt: skip
    return result


def theirs(block: Block, leaves: Leaves, running: tuple[Tensor | None, ...] = (None, None), fixed: bool = False) -> Tensor:
    x, weight, bias, bn_weight, bn_bias, residual = (leaves[name] for name in NAMES)
    functional = torch.nn.functional
    y = getattr(functional, block.conv)(x, weight, bias, **block.arguments)
    y = functional.batch_norm(y, *running, bn_weight, bn_bias, training=not fixed, momentum=0.2, eps=1e-4)
    y = y if residual is None else y + residual
    act = parse_activation(block.activation)
    return y if act is None else act.torch(y)


def leaf(t: Tensor | None, wide: bool = False, needed: bool = True) -> Tensor | None:
    if t is None:
        return None
    return (t.double() if wide else t).detach().clone(memory_format=torch.preserve_format).requires_grad_(needed)


def assert_gradient(out: Tensor, ref: Tensor, depth: int, what: str) -> None:
    """As `assert_close`, but in bf16, where z, dz and the result are rounded one after the other, with twice the bound."""
    if out.dtype == torch.bfloat16:
        error = (out.double() - ref).norm() / ref.norm()
        assert error < 2e-2, f"{what}: relative error {error:.2e}"
    else:
        assert_close(out, ref, depth=depth, what=what)


def compared(
    block: Block, dtype: torch.dtype, device: str, *, channels_last: bool = True, needed: tuple[str, ...] = NAMES,
    fixed: bool = False,
) -> list[str]:  # fmt: skip
    """Our output, running statistics and needed gradients, each checked against torch's in fp64; the kernels launched."""
    values, dy = make(block, dtype, device, channels_last)
    statistics = torch.randn(block.channels, device=device), torch.rand(block.channels, device=device) + 0.5
    results = []
    for function, wide in ((ours, False), (theirs, True)):
        leaves = {name: leaf(t, wide, name in needed) for name, t in values.items()}
        kind = torch.float64 if wide or dtype == torch.float64 else torch.float32
        running = tuple(t.to(kind, copy=True) for t in statistics)
        with record_launches() as launches:
            y = function(block, leaves, running, fixed)
            wanted = [leaves[name] for name in needed if leaves[name] is not None]
            gradients = torch.autograd.grad(y, wanted, dy.to(y.dtype)) if wanted else ()
        found = dict(zip([n for n in needed if leaves[n] is not None], gradients, strict=True))
        results.append((y, running, found, list(launches)))
    (y, running, gradients, launches), (ref, ref_running, ref_gradients, _) = results
    g = ConvGeometry.parse(
        block.input, block.weight, nd=block.nd, transposed=block.transposed, **block.arguments
    )  # fmt: skip
    assert_close(y, ref, depth=g.gemm("fprop")[2], what=f"{block}, y")
    exact = dtype.itemsize > 2
    for a, b in zip(running, ref_running, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 1e-2)
    for name, gradient in gradients.items():
        assert gradient.dtype == values[name].dtype
        if name == "bias" and not fixed:
            # The batch's own mean takes a bias away again.
            assert not gradient.any() or block.transposed
            continue
        depth = g.gemm("wgrad")[2] if name != "x" else g.gemm("dgrad")[2]
        # Batch norm's parameters are wider than what their gradients were computed from.
        assert_gradient(gradient.to(dtype), ref_gradients[name], max(depth, 16), f"{block}, d{name}")
    return launches


@rotate(block=BLOCKS, dtype=DTYPES, channels_last=[True, False])
def test_every_gradient_matches_fp64(block: Block, dtype: torch.dtype, channels_last: bool, device: str) -> None:
    # A kink's derivative jumps, and rounding may put a value on its other side.
    smooth = replace(block, activation=block.activation and "silu")
    compared(smooth if dtype.itemsize == 2 else block, dtype, device, channels_last=channels_last)


@rotate(
    block=[named(BLOCKS, "3x3 strided with a bias"), ONE, RESIDUAL, named(BLOCKS, "residual and no activation")],
    dtype=[torch.float64, torch.bfloat16],
)
def test_a_frozen_batch_norm_passes_gradients(block: Block, dtype: torch.dtype, device: str) -> None:
    launches = compared(block, dtype, device, fixed=True)
    assert "batch_norm_combine_kernel" not in launches


@rotate(block=[THREE, ONE, RESIDUAL, named(BLOCKS, "transposed 2x2")], fixed=[False, True])
def test_vectors_of_any_strides(block: Block, fixed: bool, device: str) -> None:
    values, dy = make(block, torch.float32, device)
    k = block.channels
    every_second, one, mean, var = (torch.rand(n, device=device) + 0.5 for n in (2 * k, 1, 2 * k, 2 * k))
    results = []
    for function, wide in ((ours, False), (theirs, True)):
        leaves = {name: leaf(t, wide) for name, t in values.items()}
        roots = leaves | dict(bn_weight=leaf(every_second, wide), bn_bias=leaf(one, wide))
        vectors = [roots["bn_weight"][::2], roots["bn_bias"].expand(k), *(t[::2] for t in (mean, var))]
        if wide:
            # Torch's gradient of channels-last images on CPUs takes strided weights for contiguous ones (2.13.0).
            vectors = [t.double().contiguous() for t in vectors]
        leaves |= dict(zip(("bn_weight", "bn_bias"), vectors, strict=False))
        y = function(block, leaves, tuple(vectors[2:]) if fixed else (None, None), fixed)
        wanted = {name: t for name, t in roots.items() if t is not None}
        gradients = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
        results.append(dict(y=y) | dict(zip(wanted, gradients, strict=True)))
    for name, ref in results[1].items():
        assert_close(results[0][name], ref, depth=max(ref.numel(), dy.numel() // k, 16), what=f"{block}, {name}")


@pytest.mark.filterwarnings("ignore:tritonconv")
def test_running_statistics_of_any_strides_go_to_torch_in_training(device: str) -> None:
    values, _ = make(BLOCKS[0], torch.float32, device)
    results = []
    for function, wide in ((ours, False), (theirs, True)):
        # Every second one belongs to someone else.
        storage = torch.ones(2, 2 * BLOCKS[0].channels, device=device, dtype=torch.float64 if wide else torch.float32)
        leaves = {name: leaf(t, wide) for name, t in values.items()}
        with tritonconv.set_backend("auto"):
            results.append((function(BLOCKS[0], leaves, tuple(storage[:, ::2])).double(), storage.double()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert (results[0][1][:, 1::2] == 1).all()


NEEDED = [
    ("x",), ("weight",), ("bn_weight",), ("bn_bias", "residual"), ("weight", "bn_weight", "bn_bias"), ("residual",), (),
]  # fmt: skip


@rotate(needed=NEEDED, block=[THREE, RESIDUAL])
def test_only_the_gradients_that_are_needed_are_computed(block: Block, needed: tuple[str, ...], device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        launches = compared(block, dtype, device, needed=needed)
        assert ("conv_dgrad_kernel" in launches) == ("x" in needed)
        assert ("conv_wgrad_kernel" in launches) == ("weight" in needed)


def test_which_passes_over_memory_there_are(device: str) -> None:
    def passes(block: Block, *needed: str) -> list[str]:
        kernels = compared(block, torch.bfloat16, device, needed=needed)
        large = ("conv", "matmul", "batch_norm_statistics", "batch_norm_normalize", "batch_norm_reduce", "batch_norm_input")
        return [name.removesuffix("_kernel") for name in kernels if name.startswith(large)]

    forward = ["conv_flat", "batch_norm_normalize"]
    backward = ["batch_norm_reduce", "batch_norm_input_gradient", "conv_dgrad", "conv_wgrad"]
    # No pass for statistics. A filter of several taps reads a gradient that was written before;
    assert passes(BLOCKS[0], *NAMES) == forward + backward
    # one of a single tap leaves it for the weight's gradient;
    assert passes(BLOCKS[2], *NAMES) == ["matmul", "batch_norm_normalize", "batch_norm_reduce", "conv_dgrad", "conv_wgrad"]
    # and the weight's gradient alone computes it.
    assert passes(BLOCKS[9], "weight") == [*forward, "batch_norm_reduce", "conv_wgrad"]


@pytest.mark.parametrize("block", [BLOCKS[0], BLOCKS[2], BLOCKS[4], BLOCKS[6]], ids=str)
def test_no_more_is_saved_than_torch_saves(block: Block, device: str) -> None:
    def saved(function: Any) -> int:
        values, _ = make(block, torch.float32, device)
        leaves = {name: leaf(t) for name, t in values.items()}
        seen: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(t.data_ptr(), t.numel() * t.element_size()) and t, lambda t: t
        ):
            function(block, leaves)
        return sum(seen.values())

    # Of batch norm's vectors we keep the bias too, and the count.
    assert saved(ours) <= saved(theirs) + 4 * (block.channels + 1)


def test_two_runs_are_bit_equal(device: str) -> None:
    block = RESIDUAL
    values, dy = make(block, torch.float16, device)

    def run() -> list[Tensor]:
        leaves = {name: leaf(t) for name, t in values.items()}
        y = ours(block, leaves)
        return [y, *torch.autograd.grad(y, [t for t in leaves.values() if t is not None], dy)]

    assert all(map(torch.equal, run(), run()))


STATISTICS = [
    (module, sizes, config)
    for module, sizes in (
        (conv_fprop, ((1, 128, 9, 8), (72, 128, 3, 3))), (conv_flat, ((1, 24, 9, 8), (72, 24, 3, 3))),
        (matmul, ((1, 24, 13, 11), (72, 24, 1, 1))),
    )
    for config in cover(module.configs())
]  # fmt: skip


@every({"module, sizes, config": STATISTICS})
def test_statistics_of_every_candidate_config(module: Any, sizes: Any, config: Any, device: str) -> None:
    """From the accumulators, so that they are closer than those of what is stored."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, w = (as_format(torch.randn(shape, device=device).to(dtype), True) for shape in sizes)
    x += 3
    g = ConvGeometry.parse(x.shape, w.shape, nd=2, padding=1 if w.shape[-1] == 3 else 0)
    problem = Problem(module.__name__.split(".")[-1], g, str(dtype)[6:], False, True, device_of(x.device))
    if device == "cuda" and str(config) not in map(str, possible(problem)):
        pytest.skip("the config is pruned for this type on this GPU")
    with forced(config=config):
        call = recorded(lambda x, w: convolve_dense(x, w, Epilogue(), g, "conv", Target(statistics=True)), x, w)
        z, parts, _ = call.run(x, w)
        mean, var, count = batch_norm.combine(Statistics(*parts))
    ref = torch.nn.functional.conv2d(x.double(), w.double(), padding=g.padding[1:])
    assert call.kernel == problem.kernel and count.item() == ref.numel() / ref.shape[1]
    assert_close(mean, ref.mean((0, 2, 3)), depth=count.int().item(), what="mean")
    assert_close(var, ref.var((0, 2, 3), correction=0), depth=count.int().item(), what="variance")
    assert_close(z, ref, depth=g.gemm()[2], what="z")


COMPUTED = [
    (module, config, filter_)
    for module, filter_ in ((conv_dgrad, 1), (conv_wgrad, 1), (conv_wgrad, 3))
    for config in cover(module.configs())
]


@rotate({"module, config, filter_": COMPUTED}, act=[ActivationSpec("relu"), None])
def test_a_batch_norms_gradient_on_the_way_in(module: Any, config: Any, filter_: int, act: Any, device: str) -> None:
    dtype = torch.bfloat16
    x, w = torch.randn(2, 72, 7, 9), torch.randn(40, 72, filter_, filter_)
    dy, z = torch.randn(2, 2, 40, 7, 9)
    x, w, dy, z = (as_format(t.to(device=device, dtype=dtype), True) for t in (x, w, dy, z))
    table = torch.randn(5, 40, device=device)
    g = ConvGeometry.parse(x.shape, w.shape, nd=2, padding=filter_ // 2)
    name = module.__name__.split(".")[-1]
    problem = Problem(name, g, "bfloat16", False, True, device_of(x.device), name[5:], True)  # type: ignore[arg-type]
    if str(config) not in map(str, possible(problem)):
        pytest.skip("the config is pruned for computed operands")
    mean, scale, beta, slope, offset = (row.view(-1, 1, 1).double() for row in table)
    inner = dy.double()
    if act is not None:
        inner = torch.where(scale * (z.double() - mean) + beta > 0, inner, 0.0)
    ref = scale * inner + slope * (z.double() - mean) + offset
    dx, dw, _ = torch.ops.aten.convolution_backward(
        ref, x.double(), w.double(), None, [1, 1], [filter_ // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    with forced(config=config):
        if module is conv_wgrad:
            ours, _ = launch_wgrad(dy, x, g, True, True, "conv", NormGradient(z, table, act, True))
            assert_close(ours, dw, depth=126, what="dw")
            return
        dz = torch.full_like(z, float("nan"))
        ours = launch_dgrad(dy, w, g, True, "conv", NormGradient(z, table, act, True, dz))
    assert_close(ours, dx, depth=40, what="dx")
    assert_close(dz, ref, what="dz")


@pytest.mark.parametrize("block", [named(BLOCKS, name) for name in GRADCHECK], ids=str)
def test_gradcheck(block: Block, device: str) -> None:
    values, _ = make(block, torch.float64, device)
    leaves = {name: leaf(t) for name, t in values.items() if t is not None and name != "bias"}

    def function(*tensors: Tensor) -> Tensor:
        return ours(block, dict.fromkeys(NAMES) | dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_the_operator_is_clean(device: str) -> None:
    values, _ = make(BLOCKS[4], torch.float32, device)
    x, weight, _, bn_weight, bn_bias, residual = (leaf(values[name]) for name in NAMES)
    numbers = dict(
        stride=[1, 1], padding=[0, 0], padding_name="", dilation=[1, 1], groups=1, transposed=False,
        output_padding=[], eps=1e-5, activation="relu", a=0.0,
        b=0.0, group="",
    )  # fmt: skip
    operator: Any = torch.ops.tritonconv.conv_batch_norm
    torch.library.opcheck(operator, (x, weight, None, None, None, bn_weight, bn_bias, residual), numbers)
    mean, var = torch.zeros(24, device=device), torch.ones(24, device=device)
    torch.library.opcheck(operator, (x, weight, None, mean, var, bn_weight, bn_bias, None), numbers)


class Net(torch.nn.Module):
    """Two fused layers, the second with the first's result as its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = tritonconv.nn.ConvBNReLU2d(3, 8, 3, padding=1)
        self.second = tritonconv.nn.ConvBNAct2d(8, 8, 1, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        result: Tensor = self.second(x, x)
        return result


def trained(net: Net, x: Tensor, function: Any = None) -> dict[str, Tensor]:
    """Gradients and buffers after one step."""
    net.zero_grad()
    (net if function is None else function)(x).square().mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return gradients | dict(net.named_buffers())


def twins(device: str) -> tuple[Net, Net]:
    net, other = Net().to(device), Net().to(device)
    other.load_state_dict(net.state_dict())
    return net, other


def assert_equal_steps(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=tolerance, atol=tolerance, msg=name)


def test_compiled_forward_and_backward_are_ours(device: str) -> None:
    net, compiled = twins(device)
    x = torch.randn(2, 3, 6, 6, device=device)
    with record_launches() as launches:
        step = trained(compiled, x, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    assert {"batch_norm_combine_kernel", "batch_norm_reduce_kernel", "batch_norm_running_kernel"} <= set(launches)
    with tritonconv.set_backend("torch"):
        assert_equal_steps(step, trained(net, x))


def test_under_autocast_as_torch(device: str) -> None:
    net, other = twins(device)
    x = torch.randn(2, 3, 6, 6, device=device)
    with torch.autocast(device, torch.bfloat16):
        step = trained(net, x)
        with tritonconv.set_backend("torch"):
            reference = trained(other, x)
    assert all(step[name].dtype == t.dtype for name, t in reference.items())
    assert_equal_steps(step, reference, tolerance=3e-2)


def test_activation_checkpointing_updates_statistics_as_torch_does(device: str) -> None:
    net, other = twins(device)
    x = torch.randn(2, 3, 6, 6, device=device)

    def checkpointed(module: Net) -> Any:
        # Recomputation stops once the last tensor is saved again, so that one more must come behind the layers.
        return lambda x: torch.utils.checkpoint.checkpoint(lambda x: module(x).sigmoid(), x, use_reentrant=False)

    step = trained(net, x, checkpointed(net))
    with tritonconv.set_backend("torch"):
        assert_equal_steps(step, trained(other, x, checkpointed(other)))


def test_gradients_add_up_and_scalers_divide_them(device: str) -> None:
    net, other = twins(device)
    batches = torch.randn(3, 2, 3, 6, 6, device=device)

    def run(module: Net) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        for batch in batches:
            scaler.scale(module(batch).square().mean() / len(batches)).backward()
        scaler.step(optimizer)
        scaler.update()
        return dict(module.state_dict())

    step = run(net)
    with tritonconv.set_backend("torch"):
        assert_equal_steps(step, run(other))


@every(block=[named(BLOCKS, name) for name in GRADCHECK], fixed=[False, True])
def test_a_second_derivative_is_torchs(block: Block, fixed: bool, device: str) -> None:
    values, _ = make(block, torch.float64, device)
    # One that the batch's mean takes away again has rounding errors alone as its gradient.
    values["bias"] = values["bias"] if fixed else None
    mean, var = (
        torch.randn(block.channels, device=device).double(),
        torch.rand(block.channels, device=device).double() + 0.5,
    )
    found = []
    for function in (ours, theirs):
        leaves = {name: leaf(t) for name, t in values.items()}
        wanted = [t for t in leaves.values() if t is not None]
        y = function(block, leaves, (mean.clone(), var.clone()), fixed)
        first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)])
    torch.testing.assert_close(*found)


def test_a_batch_of_one_value_per_channel_raises(device: str) -> None:
    x, w = torch.randn(1, 3, 3, 3, device=device), torch.randn(4, 3, 3, 3, device=device)
    with tritonconv.set_backend("auto"), pytest.raises(ValueError, match="more than 1 value per channel"):
        TF.conv2d_bn_act(x, w, None, None, None, None, None, training=True)


def test_an_empty_batch(device: str) -> None:
    w = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    y = TF.conv2d_bn_act(torch.randn(0, 3, 5, 5, device=device), w, None, None, None, None, None, training=True)
    assert y.shape == (0, 4, 3, 3)


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(weight=(4, 2, 3, 3)), "expected input"), (dict(residual=(1, 4, 3, 3)), "expected residual of the output's size"),
    (dict(bn_weight=(3,)), "weight"), (dict(running=(3,)), "running_mean"), (dict(bias=(3,)), "bias"),
], ids=lambda v: "-".join(v) if isinstance(v, dict) else "")  # fmt: skip
def test_wrong_arguments_raise_and_change_nothing(wrong: dict[str, Any], message: str, device: str) -> None:
    shapes = dict(weight=(4, 3, 3, 3), bias=(4,), running=(4,), bn_weight=(4,), residual=(2, 4, 3, 3)) | wrong
    x = torch.randn(2, 3, 5, 5, device=device)
    w, b, mean, gamma, residual = (torch.zeros(s, device=device) for s in shapes.values())
    with tritonconv.set_backend("auto"), pytest.raises(RuntimeError, match=message):
        TF.conv2d_bn_act(x, w, b, mean, mean.clone(), gamma, None, training=True, residual=residual)
    assert not mean.any()


def test_large_means_leave_the_variance_right(device: str) -> None:
    x = torch.randn(4, 8, 9, 9, device=device, dtype=torch.float64) + 1000
    w = torch.randn(6, 8, 1, 1, device=device, dtype=torch.float64)
    mean, var = torch.zeros(6, device=device), torch.zeros(6, device=device)
    TF.conv2d_bn_act(x.float(), w.float(), None, mean, var, None, None, training=True, momentum=1.0)
    z = torch.nn.functional.conv2d(x.float().double(), w.float().double())
    torch.testing.assert_close(var.double(), z.var((0, 2, 3)), rtol=2e-3, atol=0)


@every(seed=some(range(6), 3))
def test_random_layers(seed: int, device: str) -> None:
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    groups, nd = draw(1, 1, 2, 3), draw(1, 2, 3)
    c, k = groups * draw(1, 5, 8, 24), groups * draw(1, 7, 16)
    filter_ = draw(1, 2, 3)
    size = [filter_ + draw(2, 3, 5) for _ in range(nd)]
    block = Block(
        f"seed {seed}", (draw(2, 3), c, *size), (k, c // groups, *(filter_,) * nd),
        dict(stride=draw(1, 2), padding=draw(0, 1), groups=groups),
        activation=draw("relu", "silu", "gelu", "leaky_relu", None), residual=draw(True, False), bias=draw(True, False),
    )  # fmt: skip
    for dtype, channels_last in itertools.product((torch.float32, torch.float64), (True, False)):
        compared(block, dtype, device, channels_last=channels_last)
