"""Gradients of convolutions: every case, dtype, memory format and candidate config against fp64, and autograd's rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, ConvCase, make_tensors
from matrix import cover, every, named, rotate, some
from reference import assert_close
from tritonconv.kernels import conv_dgrad, conv_wgrad

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.gradients import conv_wgrad as launch_wgrad
from tritonconv.ops.core.launch import device_of, forced, record_launches
from tritonconv.ops.core.layout import is_dense, suggests_channels_last
from tritonconv.tuning import Problem, device_named
from tritonconv.tuning.candidates import possible
from tritonconv.tuning.ranges import WORKSPACE, ranges

PADDED = named(CASES, "3x3 padded")


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


def conv(
    case: ConvCase, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None, module: object = TF
) -> torch.Tensor:
    result: torch.Tensor = getattr(module, f"conv{x.dim() - 2}d")(x, w, b, **case.arguments)
    return result


def gradients(
    case: ConvCase, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, dy: torch.Tensor, module: object, of: str = "xwb"
) -> list[torch.Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in (x, w, b)]
    wanted = [t.requires_grad_() for name, t in zip("xwb", leaves, strict=True) if name in of]
    y = conv(case, *leaves, module)
    return list(torch.autograd.grad(y, wanted, dy.to(y)))


def compared(
    case: ConvCase, x: torch.Tensor, w: torch.Tensor, *, dy_cl: bool = True, of: str = "xwb"
) -> list[torch.Tensor]:
    """Ours of input, weight and bias, each checked against torch's in fp64 from the same numbers."""
    b = torch.randn(w.shape[0], device=x.device).to(x)
    with torch.no_grad():
        dy = torch.randn_like(conv(case, x.double(), w.double(), module=torch.nn.functional)).to(x.dtype)
    if not dy_cl:
        dy = dy.contiguous()
    with record_launches() as launches:
        ours = gradients(case, x, w, b, dy, TF, of)
    if dy.numel():
        direct = "depthwise" if case.kernel == "depthwise" else "conv"
        # Large filters may go to tensor cores.
        passes = dict(x="" if direct == "depthwise" else "_dgrad", w="_wgrad")
        for pass_ in (pass_ for name, pass_ in passes.items() if name in of):
            assert {f"{direct}{pass_}_kernel", f"{direct}_bands{pass_}_kernel"} & set(launches), launches
    reference = gradients(case, x.double(), w.double(), b.double(), dy.double(), torch.nn.functional, of)
    g = ConvGeometry.parse(x.shape, w.shape, nd=x.dim() - 2, **case.arguments)
    for name, out, ref in zip(of, ours, reference, strict=True):
        depth = g.gemm("dgrad" if name == "x" else "wgrad")[2]
        assert_close(out, ref, depth=max(1, depth), what=f"{case}, d{name}")
    return ours


@rotate(case=CASES, dtype=DTYPES, x_cl=[True, False], w_cl=[True, False])
def test_every_gradient_matches_fp64_in_the_format_of_what_it_belongs_to(
    case: ConvCase, dtype: torch.dtype, x_cl: bool, w_cl: bool, device: str
) -> None:
    x, w = make_tensors(case, dtype, device, x_cl=x_cl, w_cl=w_cl)
    dx, dw, _ = compared(case, x, w, dy_cl=x_cl)
    assert is_dense(dx, suggests_channels_last(x)) and is_dense(dw, suggests_channels_last(w))


# Every tile's edges fall inside; 128 channels have one tap a tile, 24 have several.
CONFIG_CASES = [
    ConvCase("3x1 of 128", (1, 128, 9, 8), (72, 128, 3, 1), "", dict(padding=(1, 0))),
    ConvCase("3x3 of 24 stride 2", (1, 24, 9, 8), (40, 24, 3, 3), "", dict(padding=1, stride=2)),
]
PASSES = [("dgrad", conv_dgrad), ("wgrad", conv_wgrad)]
CONFIGS = [(case, pass_, config) for case in CONFIG_CASES for pass_, module in PASSES for config in cover(module.configs())]


@rotate({"case, pass_, config": CONFIGS}, dtype=[torch.float32, torch.bfloat16])
def test_every_candidate_config(case: ConvCase, pass_: Any, config: object, dtype: torch.dtype, device: str) -> None:
    x, w = make_tensors(case, dtype, device)
    if device == "cuda":
        g = ConvGeometry.parse(x.shape, w.shape, nd=2, **case.arguments)
        problem = Problem(f"conv_{pass_}", g, str(dtype)[6:], False, True, device_of(torch.device("cuda")), pass_)
        if str(config) not in map(str, possible(problem)):
            pytest.skip("the config is pruned for this dtype on this GPU")
    with forced(config=config):
        compared(case, x, w, of="x" if pass_ == "dgrad" else "wb")


MANY_PIXELS = ConvCase("many pixels", (1, 16, 40, 32), (24, 16, 3, 3), "", dict(padding=1))


@pytest.mark.parametrize(("dtype", "w_cl"), [(torch.float32, False), (torch.bfloat16, True)], ids=["fp32", "bf16"])
def test_ranges_of_many_pixels_are_added(dtype: torch.dtype, w_cl: bool, device: str) -> None:
    # A GPU with many multiprocessors wants many ranges.
    gpu, config = device_named("H200"), conv_wgrad.configs()[6]
    x, w = make_tensors(MANY_PIXELS, dtype, device, w_cl=w_cl)
    b, dy = torch.randn(24, device=device).to(x), torch.randn_like(conv(MANY_PIXELS, x, w))
    with record_launches() as launches, forced(device=gpu, config=config):
        first, second = (gradients(MANY_PIXELS, x, w, b, dy, TF, "wb") for _ in range(2))
    assert launches.count("wgrad_reduce_kernel") == 4 and all(map(torch.equal, first, second))
    reference = gradients(MANY_PIXELS, x.double(), w.double(), b.double(), dy.double(), torch.nn.functional, "wb")
    for name, out, ref in zip("wb", first, reference, strict=True):
        assert_close(out, ref, depth=1280, what=f"d{name}")


@every(case=some(CASES[:3], 2))
def test_two_runs_are_bit_equal(case: ConvCase, device: str) -> None:
    x, w = make_tensors(case, torch.float16, device)
    b = torch.randn(w.shape[0], device=device).half()
    dy = torch.randn_like(conv(case, x, w))
    first, second = (gradients(case, x, w, b, dy, TF) for _ in range(2))
    assert all(torch.equal(a, c) for a, c in zip(first, second, strict=True))


def test_only_the_gradients_that_are_needed_are_computed(device: str) -> None:
    def kernels(*needed: bool) -> list[str]:
        x, w = make_tensors(PADDED, torch.float32, device)
        leaves = [t.requires_grad_(need) for t, need in zip((x, w, torch.randn(w.shape[0])), needed, strict=True)]
        with record_launches() as launches:
            conv(PADDED, *leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == list(needed)
        return [name for name in dict.fromkeys(launches) if "grad" in name]

    assert kernels(True, False, False) == ["conv_dgrad_kernel"]
    # So few pixels are one range, whose sums no one needs to add.
    assert kernels(False, True, False) == ["conv_wgrad_kernel"]
    assert kernels(True, True, False) == ["conv_dgrad_kernel", "conv_wgrad_kernel"]
    assert kernels(False, False, True) == []


def test_what_is_not_needed_is_not_saved(device: str) -> None:
    def saved(x_needs: bool, w_needs: bool) -> int:
        x, w = make_tensors(PADDED, torch.float32, device)
        seen: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            conv(PADDED, x.requires_grad_(x_needs), w.requires_grad_(w_needs))
        return sum(t.numel() for t in seen)

    x, w = make_tensors(PADDED, torch.float32, device)
    assert (
        saved(True, False) == w.numel() and saved(False, True) == x.numel() and saved(True, True) == x.numel() + w.numel()
    )


def test_a_gradient_that_is_expanded_is_read_rightly(device: str) -> None:
    x, w = make_tensors(PADDED, torch.float64, device)
    x.requires_grad_()
    conv(PADDED, x, w).sum().backward()
    (expected,) = torch.autograd.grad(conv(PADDED, x, w, module=torch.nn.functional).sum(), x)
    torch.testing.assert_close(x.grad, expected)


@every(case=[PADDED, named(CASES, "3-d"), named(CASES, "depthwise")])
def test_64_bit_offsets_change_nothing(case: ConvCase, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = make_tensors(case, torch.float32, device)
    b, dy = torch.randn(w.shape[0], device=device), torch.randn_like(conv(case, x, w))
    narrow = gradients(case, x, w, b, dy, TF)
    monkeypatch.setattr(ConvGeometry, "needs_int64", True)
    assert all(torch.equal(a, c) for a, c in zip(narrow, gradients(case, x, w, b, dy, TF), strict=True))


def test_nan_reaches_the_gradients_that_see_it(device: str) -> None:
    case = PADDED
    x, w = make_tensors(case, torch.float32, device)
    b, dy = torch.randn(w.shape[0], device=device), torch.randn_like(conv(case, x, w))
    dy[0, 3, 2, 2] = float("nan")
    ours, reference = (gradients(case, x, w, b, dy, module) for module in (TF, torch.nn.functional))
    for out, ref in zip(ours, reference, strict=True):
        assert torch.equal(out.isnan(), ref.isnan()) and ref.isnan().any()


@rotate(nd=[1, 2, 3], options=[dict(stride=2, padding=1), dict(padding="same", dilation=2), dict(groups=2)])
def test_gradcheck(nd: int, options: dict[str, object], device: str) -> None:
    x = torch.randn(1, 4, *(4,) * nd, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(
        6, 4 // int(options.get("groups", 1)), *(2,) * nd, dtype=torch.float64, device=device, requires_grad=True
    )  # type: ignore[call-overload]
    b = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: getattr(TF, f"conv{nd}d")(*t, **options), (x, w, b), fast_mode=True)


def test_a_layer_that_is_unbatched(device: str) -> None:
    layer = tritonconv.nn.Conv2d(3, 4, 3, device=device)
    x = torch.randn(3, 6, 6, device=device, requires_grad=True)
    layer(x).square().sum().backward()
    ours = x.grad, layer.weight.grad
    x.grad = layer.weight.grad = None
    torch.nn.functional.conv2d(x, layer.weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(ours, (x.grad, layer.weight.grad), rtol=1e-4, atol=1e-4)


def test_linear_layers_have_gradients(device: str) -> None:
    x, w, b = (torch.randn(s, device=device, dtype=torch.float64, requires_grad=True) for s in ((3, 5, 7), (4, 7), (4,)))
    assert torch.autograd.gradcheck(TF.linear, (x, w, b), fast_mode=True)


def test_what_follows_a_convolution_has_torchs_gradients(device: str) -> None:
    block = tritonconv.nn.ConvBNAct2d(3, 8, 3, padding=1, activation="silu", device=device).eval()
    x = torch.randn(2, 3, 6, 6, device=device)
    residual = torch.randn(2, 8, 6, 6, device=device, requires_grad=True)

    def run() -> list[torch.Tensor]:
        return list(torch.autograd.grad(block(x, residual).square().sum(), [*block.parameters(), residual]))

    with record_launches() as launches:
        ours = run()
    assert "conv_wgrad_kernel" in launches
    with tritonconv.set_backend("torch"):
        torch.testing.assert_close(ours, run(), rtol=1e-3, atol=1e-3)


def test_a_fused_operator_says_that_it_has_no_gradient(device: str) -> None:
    x, w = torch.randn(1, 3, 5, 5, device=device), torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    numbers = dict(stride=[1], padding=[0], padding_name="", dilation=[1], groups=1, eps=0.0, a=0.0, b=0.0, kind="conv")
    y = torch.ops.tritonconv.conv(x, w, None, None, None, None, None, None, activation="silu", **numbers)
    with pytest.raises(NotImplementedError, match="call the operator alone"):
        y.sum().backward()


def test_under_autocast_gradients_have_the_parameters_dtype(device: str) -> None:
    layer = tritonconv.nn.Conv2d(8, 8, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(torch.randn(2, 8, 6, 6, device=device))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_operators_are_clean(device: str) -> None:
    x, w = torch.randn(2, 4, 5, 5, device=device), torch.randn(6, 4, 3, 3, device=device)
    dy = torch.randn(2, 6, 5, 5, device=device)
    numbers = dict(stride=[1], padding=[1], padding_name="", dilation=[1], groups=1, kind="conv")
    for channels_last in (False, True):
        torch.library.opcheck(
            torch.ops.tritonconv.conv_dgrad,
            (dy, w),
            dict(input_shape=list(x.shape), channels_last=channels_last, **numbers),
        )
        torch.library.opcheck(
            torch.ops.tritonconv.conv_wgrad, (dy, x),
            dict(weight_shape=list(w.shape), channels_last=channels_last, bias=channels_last, **numbers),
        )  # fmt: skip
    none = (None,) * 6
    epilogue = dict(eps=0.0, activation="", a=0.0, b=0.0)
    leaves = x.requires_grad_(), w.requires_grad_()
    torch.library.opcheck(torch.ops.tritonconv.conv, (*leaves, *none), numbers | epilogue)


def test_compiled_forward_and_backward_run_on_our_kernels(device: str) -> None:
    x = torch.randn(2, 4, 6, 6, device=device, requires_grad=True)
    w = torch.randn(6, 4, 3, 3, device=device, requires_grad=True)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return TF.conv2d(x, w, padding=1, stride=2).relu().square().sum()

    with record_launches() as launches:
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w).backward()
    assert {"conv_dgrad_kernel", "conv_wgrad_kernel"} <= set(launches)
    ours = x.grad, w.grad
    with tritonconv.set_backend("torch"):
        torch.testing.assert_close(ours, torch.autograd.grad(loss(x, w), (x, w)), rtol=1e-4, atol=1e-4)


def test_flops_of_gradients_are_counted(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def counted(module: object) -> int:
        x = torch.randn(2, 4, 6, 6, device=device, requires_grad=True)
        w = torch.randn(6, 4, 3, 3, device=device, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module.conv2d(x, w).sum().backward()  # type: ignore[attr-defined]
        return int(counter.get_total_flops())

    assert counted(TF) == counted(torch.nn.functional)


def test_activation_checkpointing(device: str) -> None:
    layer = tritonconv.nn.Conv2d(4, 4, 3, padding=1, device=device)
    x = torch.randn(1, 4, 5, 5, device=device, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert all(map(torch.equal, plain, torch.autograd.grad(again.square().sum(), [x, layer.weight])))


def test_the_workspace_is_bounded_and_ranges_cover_all_pixels() -> None:
    for shape in ((256, 64, 112, 112), (1, 4096, 3, 3), (8, 3, 512, 512)):
        for filters in (3, 64, 4096):
            g = ConvGeometry.parse(shape, (filters, shape[1], 3, 3), nd=2, padding=1)
            problem = Problem("conv_wgrad", g, "bfloat16", False, True, device_named("H200"), "wgrad")
            for blocks in ((128, 128, 64), (64, 16, 16)):
                count, size = ranges(problem, *blocks)
                _, columns, pixels = problem.gemm
                assert (count - 1) * size < pixels <= count * size and size % blocks[2] == 0
                assert count == 1 or count * filters * columns * 4 <= WORKSPACE


def test_an_empty_batch_has_zero_gradients() -> None:
    geometry = ConvGeometry.parse((0, 4, 5, 5), (6, 4, 3, 3), nd=2)
    dw, db = launch_wgrad(torch.randn(0, 6, 3, 3), torch.randn(0, 4, 5, 5), geometry, False, True, "conv")
    assert db is not None and not dw.any() and not db.any()
