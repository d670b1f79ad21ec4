"""Deformable convolution's rules: errors, autocast, determinism, operators, torch.compile, modules and the epilogue."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deform_reference import deform_reference
from reference import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import DeformGeometry
from tritonconv.nn import DeformConv2d, DeformConv2dPack
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.launch import record_launches
from tritonconv.ops.core.layout import is_dense
from tritonconv.ops.core.observe import observe
from tritonconv.ops.deform.gradients import current_scatter, scale_of
from tritonconv.ops.deform.operator import deform_convolution

FORWARD = ["deform_conv_kernel"]


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with tritonconv.set_backend("triton"):
        yield


def make(
    n: int = 1, c: int = 8, size: int = 4, k: int = 4, groups: int = 1, offset_groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, offset, weight, bias and mask of a 2x2 layer without padding."""
    p, taps = size - 1, 4 * offset_groups
    offset = (torch.randint(-20, 20, (n, 2 * taps, p, p)) * 2 + 1) / 16
    found = (
        torch.randn(n, c, size, size), offset, torch.randn(k, c // groups, 2, 2), torch.randn(k), torch.rand(n, taps, p, p),
    )  # fmt: skip
    return tuple(t.to(dtype) for t in found)  # type: ignore[return-value]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


X, O, W, M = (2, 6, 5, 5), (2, 8, 4, 4), (4, 6, 2, 2), (2, 4, 4, 4)  # noqa: E741
f = TF.deform_conv2d
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("three axes", lambda: f(zeros(6, 5, 5), zeros(*O), zeros(*W)), ValueError, r"input of 4 axes.*got 3"),
    ("offset of three axes", lambda: f(zeros(*X), zeros(8, 4, 4), zeros(*W)), RuntimeError, r"offset of 4 axes"),
    ("weight of three axes", lambda: f(zeros(*X), zeros(*O), zeros(4, 6, 2)), RuntimeError, r"weight of 4 axes"),
    ("no tensor", lambda: f(None, zeros(*O), zeros(*W)), TypeError,
     "'input' must be Tensor, not NoneType"),  # type: ignore[arg-type]
    ("no offset", lambda: f(zeros(*X), None, zeros(*W)), TypeError, "'offset'"),  # type: ignore[arg-type]
    ("few offsets", lambda: f(zeros(*X), zeros(2, 7, 4, 4), zeros(*W)), RuntimeError,
     r"multiple of 2 \* weight.size\[2\].*= 8, got offset.shape\[1\] = 7"),
    ("odd offsets", lambda: f(zeros(*X), zeros(2, 12, 4, 4), zeros(*W)), RuntimeError, r"got offset.shape\[1\] = 12"),
    ("offset groups", lambda: f(zeros(*X), zeros(2, 32, 4, 4), zeros(*W)), RuntimeError,
     r"divide the input's 6 channels, but got 4"),
    ("mask channels", lambda: f(zeros(*X), zeros(*O), zeros(*W), mask=zeros(2, 8, 4, 4)), RuntimeError,
     r"mask.shape\[1\] is not valid: got: 8 expected: 4"),
    ("batch of offsets", lambda: f(zeros(*X), zeros(1, 8, 4, 4), zeros(*W)), RuntimeError, "invalid batch size of offset"),
    ("batch of masks", lambda: f(zeros(*X), zeros(*O), zeros(*W), mask=zeros(1, 4, 4, 4)), RuntimeError,
     "invalid batch size of mask"),
    ("offset size", lambda: f(zeros(*X), zeros(2, 8, 5, 5), zeros(*W)), RuntimeError,
     r"offset output dims: \(5, 5\) - computed output dims: \(4, 4\)"),
    ("mask size", lambda: f(zeros(*X), zeros(*O), zeros(*W), mask=zeros(2, 4, 4, 5)), RuntimeError,
     r"mask output dims: \(4, 5\) - computed"),
    ("too small", lambda: f(zeros(2, 6, 1, 1), zeros(2, 8, 0, 0), zeros(*W)), RuntimeError,
     "Calculated output size too small - out_h: 0 out_w: 0"),
    ("stride", lambda: f(zeros(*X), zeros(*O), zeros(*W), stride=0), RuntimeError, "stride_h: 0 stride_w: 0"),
    ("padding", lambda: f(zeros(*X), zeros(*O), zeros(*W), padding=(0, -1)), RuntimeError, "pad_h: 0 pad_w: -1"),
    ("dilation", lambda: f(zeros(*X), zeros(*O), zeros(*W), dilation=(0, 1)), RuntimeError, "dilation_h: 0 dilation_w: 1"),
    ("three strides", lambda: f(zeros(*X), zeros(*O), zeros(*W), stride=(1, 1, 1)), RuntimeError, "stride"),
    ("a word", lambda: f(zeros(*X), zeros(*O), zeros(*W), padding="same"), TypeError, "'padding'"),
    ("channels", lambda: f(zeros(*X), zeros(*O), zeros(4, 4, 2, 2)), RuntimeError,
     r"divide the input's 6 channels, but got 4"),
    ("filters of groups", lambda: f(zeros(*X), zeros(*O), zeros(4, 2, 2, 2)), RuntimeError,
     r"that the 3 groups divide, but got 4"),
    ("bias", lambda: f(zeros(*X), zeros(*O), zeros(*W), zeros(5)), RuntimeError, r"4 elements.*\[5\]"),
    ("type of weight", lambda: f(zeros(*X), zeros(*O), zeros(*W).double()), RuntimeError, "weight type.*the same"),
    ("type of offset", lambda: f(zeros(*X), zeros(*O).double(), zeros(*W)), RuntimeError, "offset type.*the same"),
    ("coarser offset", lambda: f(zeros(*X), zeros(*O).half(), zeros(*W)), RuntimeError, "offset type.*the same"),
    ("type of mask", lambda: f(zeros(*X), zeros(*O), zeros(*W), mask=zeros(*M).half()), RuntimeError,
     "mask type.*the same"),
    ("type of bias", lambda: f(zeros(*X), zeros(*O), zeros(*W), zeros(4).half()), RuntimeError, "bias type.*the same"),
    ("device", lambda: f(zeros(*X), zeros(*O).to("meta"), zeros(*W)), RuntimeError, "same device.*for offset"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "says"), [pytest.param(*rest, id=name) for name, *rest in BAD])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_errors(call: Any, error: type[Exception], says: str, backend: Any) -> None:
    with tritonconv.set_backend(backend), record_launches() as launches, pytest.raises(error, match=says):
        call()
    assert not launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coarse", [False, True], ids=["fp32 offsets", "half offsets"])
def test_autocast_keeps_half_precision(dtype: torch.dtype, coarse: bool) -> None:
    x, offset, weight, bias, mask = make(c=16)
    if coarse:
        offset, mask = offset.to(dtype), mask.to(dtype)
    ours = leaves(x, offset, weight, bias, mask)
    with torch.autocast("cpu", dtype=dtype), record_launches() as launches:
        y = TF.deform_conv2d(*ours[:4], mask=ours[4])
    assert y.dtype == dtype and launches == FORWARD
    rounded = [t.to(dtype).double() for t in (x, weight, bias)]
    wide = leaves(rounded[0], offset.double(), rounded[1], rounded[2], mask.double())
    expected = deform_reference(*wide[:4], mask=wide[4])
    assert_close(y, expected, depth=64)
    dy = torch.randn(y.shape).to(dtype)
    found = torch.autograd.grad(y, ours, dy)
    for got, want, t in zip(found, torch.autograd.grad(expected, wide, dy.double()), ours, strict=True):
        # Gradients have their tensors' types; those of cast tensors were rounded on the way.
        assert got.dtype == t.dtype
        assert_close(got.to(dtype), want, depth=64)


def test_fine_offsets_stay_fine() -> None:
    """A place that bf16 cannot tell from a whole number."""
    x = torch.tensor([0.0, 256.0] * 8).view(1, 1, 2, 8).bfloat16()
    offset = torch.full((1, 2, 2, 8), 0.0)
    offset[:, 1] = 4 + 2.0**-6
    y = TF.deform_conv2d(x, offset, torch.ones(1, 1, 1, 1).bfloat16())
    assert y[0, 0, 0, 0] == 4.0 and offset.bfloat16()[0, 1, 0, 0] == 4.0


def test_fast_sums_are_selectable_and_determinism_goes_first() -> None:
    x, offset, weight, bias, _ = make(c=6)
    assert current_scatter() == "deterministic"
    expected = torch.autograd.grad(
        deform_reference(*(wide := leaves(*(t.double() for t in (x, offset, weight, bias))))).sum(), wide[0]
    )[0]
    for dtype, channels_last in (
        (torch.float32, True),
        (torch.float32, False),
        (torch.bfloat16, True),
        (torch.float64, True),
    ):
        ours = [t.to(dtype) for t in (x, offset, weight, bias)]
        image = ours[0].contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        image.requires_grad_()
        with tritonconv.set_deform_scatter("fast"), record_launches() as launches:
            (dx,) = torch.autograd.grad(TF.deform_conv2d(image, *ours[1:]).sum(), image)
        # Float sums in the gradient's own memory, where they have its type and format.
        in_place = channels_last and dtype in (torch.float32, torch.float64)
        assert launches == FORWARD + ["deform_conv_dgrad_kernel"] + ["deform_scatter_kernel"] * (not in_place)
        if dtype != torch.bfloat16:
            assert_close(dx, expected, depth=16)
    with tritonconv.set_deform_scatter("fast"):
        assert current_scatter() == "fast"
        torch.use_deterministic_algorithms(True)
        try:
            assert current_scatter() == "deterministic"
        finally:
            torch.use_deterministic_algorithms(False)
    assert current_scatter() == "deterministic"
    with pytest.raises(ValueError, match="deterministic, fast, got 'slow'"):
        tritonconv.set_deform_scatter("slow")  # type: ignore[arg-type]


def test_the_scale_leaves_room_for_every_sum() -> None:
    x, offset, weight, _, mask = make(c=6)
    g = DeformGeometry.parse(x.shape, offset.shape, weight.shape, mask.shape)
    dy = torch.randn(g.conv.output_shape)
    bound = dy.abs().max().item() * weight.abs().sum(0).max().item() * mask.max().item() * 9 * 4
    scale = scale_of(dy, mask, weight, g).item()
    assert 2**61 <= bound * scale <= 2**62 and math.log2(scale).is_integer()
    assert scale_of(dy * math.inf, mask, weight, g) == 0 and scale_of(dy * math.nan, None, weight, g) == 0
    assert scale_of(dy * 0, mask, weight, g) > 0
    grouped = DeformGeometry.parse(x.shape, offset.shape, (4, 3, 2, 2), mask.shape)
    bound = dy.abs().max().item() * weight[:, :3].abs().view(2, 2, 3, 2, 2).sum(1).max().item() * mask.max().item() * 36
    assert 2**61 <= bound * scale_of(dy, mask, weight[:, :3], grouped).item() <= 2**62


@pytest.mark.parametrize("wanted", range(5))
def test_only_gradients_that_are_needed(wanted: int) -> None:
    tensors = list(make(c=4))
    tensors[wanted].requires_grad_()
    x, offset, weight, bias, mask = tensors
    y = TF.deform_conv2d(x, offset, weight, bias, mask=mask)
    with record_launches() as launches:
        (found,) = torch.autograd.grad(y.sum(), tensors[wanted])
    assert found.shape == tensors[wanted].shape
    inner, weights = "deform_conv_dgrad_kernel", "deform_conv_wgrad_kernel"
    assert launches == [[inner, "deform_scatter_kernel"], [inner], [weights], [], [inner]][wanted]


def test_gradcheck_of_all_five() -> None:
    for offset_groups in (1, 2):
        tensors = leaves(*make(c=4, size=2, groups=offset_groups, offset_groups=offset_groups, dtype=torch.float64))
        assert torch.autograd.gradcheck(lambda x, o, w, b, m: TF.deform_conv2d(x, o, w, b, mask=m), tensors, fast_mode=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gradients_have_gradients(backend: Any) -> None:
    x, offset, weight, *_ = leaves(*make(c=2, size=3, dtype=torch.float64))
    with tritonconv.set_backend(backend):
        assert torch.autograd.gradgradcheck(lambda *t: TF.deform_conv2d(*t), (x, offset, weight), fast_mode=True)


def test_empty_batches() -> None:
    tensors = leaves(*make(n=0))
    x, offset, weight, bias, mask = tensors
    for backend in ("triton", "torch"):
        with tritonconv.set_backend(backend):
            y = TF.deform_conv2d(x, offset, weight, bias, mask=mask)
            assert y.shape == (0, 4, 3, 3)
            found = torch.autograd.grad(y, tensors, zeros(0, 4, 3, 3))
        assert [t.shape for t in found] == [t.shape for t in tensors]
        assert all((t == 0).all() for t in found)


def test_any_strides_are_read_where_they_lie() -> None:
    x, offset, weight, bias, mask = make(n=2, c=8)
    expected = deform_reference(x, offset, weight, bias, mask=mask)
    wider = torch.randn(2, 4, 4, 20)
    wider[..., 4:12] = x.permute(0, 2, 3, 1)
    odd = torch.randn(2, 3, 3, 30)
    odd[..., ::2][..., :8] = offset.permute(0, 2, 3, 1)
    views = wider[..., 4:12].permute(0, 3, 1, 2), odd[..., ::2][..., :8].permute(0, 3, 1, 2)
    calls: list[Any] = []
    with observe(calls.append):
        TF.deform_conv2d(views[0], views[1], weight.contiguous(memory_format=torch.channels_last), bias, mask=mask)
        TF.deform_conv2d(x.contiguous(), offset, weight, bias, mask=mask)
    assert [(c.decision.backend, c.decision.copies) for c in calls] == [("triton", 0), ("triton", 2)]
    assert calls[0].macs == 2 * 9 * (8 * 4 * 4 + 4 * 4 * 8)
    for image, places in ((views[0], views[1]), (x.expand(2, 8, 4, 4), offset)):
        assert_close(TF.deform_conv2d(image, places, weight, bias, mask=mask), expected, depth=32)
    one = x[:1].expand(2, 8, 4, 4)
    found = torch.autograd.grad(TF.deform_conv2d(one, *(ours := leaves(offset, weight))).sum(), ours)
    wide = leaves(offset.double(), weight.double())
    for got, want in zip(found, torch.autograd.grad(deform_reference(one, *wide).sum(), wide), strict=True):
        assert_close(got, want, depth=32)


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_a_batch_norm_a_residual_and_an_activation_behind_it(channels_last: bool) -> None:
    x, offset, weight, bias, mask = make(c=8, k=6)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    norm = BatchNorm(torch.randn(6), torch.rand(6) + 0.5, torch.randn(6), torch.randn(6), 1e-5)
    epilogue = Epilogue(bias, norm, torch.randn(1, 6, 3, 3), parse_activation("silu"))
    with record_launches() as launches:
        y = deform_convolution("deform_conv2d", x, offset, mask, weight, epilogue, (1, 0, 1))
    assert launches == FORWARD and is_dense(y, channels_last)
    expected = epilogue.map(Tensor.double).torch(deform_reference(x, offset, weight, bias, mask=mask))
    assert_close(y, expected, depth=32)
    weight.requires_grad_()
    again = deform_convolution("deform_conv2d", x, offset, mask, weight, epilogue, (1, 0, 1))
    assert_close(again.detach(), expected, depth=32)
    assert torch.autograd.grad(again.sum(), weight)[0].isfinite().all()


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = leaves(*make(c=6, groups=2, offset_groups=3))
    x, offset, weight, bias, mask = tensors
    y = TF.deform_conv2d(x, offset, weight, bias, mask=mask)
    narrow = [y, *torch.autograd.grad(y.sum(), tensors)]
    monkeypatch.setattr(DeformGeometry, "needs_int64", property(lambda _: True))
    y = TF.deform_conv2d(x, offset, weight, bias, mask=mask)
    for a, b in zip(narrow, [y, *torch.autograd.grad(y.sum(), tensors)], strict=True):
        assert torch.equal(a, b)


def test_the_operator_keeps_torchs_rules() -> None:
    x, offset, weight, bias, mask = leaves(*make(c=4, size=3, dtype=torch.float64))
    numbers = dict(stride=[1], padding=[0], dilation=[1], eps=0.0, activation="", a=0.0, b=0.0)
    torch.library.opcheck(
        torch.ops.tritonconv.deform_conv2d, (x, weight, bias, None, None, None, None, offset, mask, None), numbers
    )
    dy = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.tritonconv.deform_conv2d_backward, tuple(t.detach() for t in (dy, x, weight, offset, mask)),
        dict(needs=[True] * 5, stride=[1], padding=[0], dilation=[1]),
    )  # fmt: skip
    fused = torch.ops.tritonconv.deform_conv2d(
        x, weight, bias, None, None, None, None, offset, mask, None, **{**numbers, "activation": "relu"}
    )
    with pytest.raises(NotImplementedError, match="is not built"):
        fused.sum().backward()


def test_it_compiles_whole() -> None:
    layer = DeformConv2d(4, 6, 2, groups=2)
    x, offset, *_, mask = leaves(*make(c=4))

    def run(function: Any) -> list[Tensor]:
        y = function(x, offset, mask)
        return [y, *torch.autograd.grad(y.square().sum(), (x, offset, mask, layer.weight, layer.bias))]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(layer), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(compiled(x, offset, mask), layer(x, offset, mask))
    torch._dynamo.reset()


def test_flops_are_counted() -> None:
    x, offset, weight, bias, mask = leaves(*make(c=8))
    with FlopCounterMode(display=False) as counter:
        TF.deform_conv2d(x, offset, weight, bias, mask=mask).sum().backward()
    products, samples = 9 * 8 * 4 * 4, 4 * 9 * 4 * 8
    assert counter.get_total_flops() == 2 * (3 * products + 4 * samples)


def test_backends() -> None:
    x, offset, weight, bias, mask = make(c=4)
    with tritonconv.set_backend("torch"), record_launches() as launches:
        y = TF.deform_conv2d(x, offset, weight, bias, mask=mask)
    assert not launches
    assert_close(y, deform_reference(x, offset, weight, bias, mask=mask), depth=16)
    layer = DeformConv2d(4, 4, 2)
    layer.backend = "torch"
    with tritonconv.set_backend("auto"), record_launches() as launches:
        layer(x, offset)
    assert not launches
    with tritonconv.set_backend("auto"), pytest.warns(UserWarning, match=r"deform_conv2d .* runs on torch: .*torch\.func"):
        stacked = torch.func.vmap(lambda t: TF.deform_conv2d(t, offset, weight))(torch.stack((x, x)))
    assert_close(stacked[1], deform_reference(x, offset, weight), depth=16)
    with tritonconv.set_backend("auto"):
        _, tangent = torch.func.jvp(lambda t: TF.deform_conv2d(t, offset, weight), (x,), (x,))
    assert_close(tangent, deform_reference(x, offset, weight), depth=16)
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for"):
        torch.func.jvp(lambda t: TF.deform_conv2d(t, offset, weight), (x,), (x,))


def test_the_module_is_torchvisions() -> None:
    torch.manual_seed(3)
    layer = DeformConv2d(8, 6, (3, 2), stride=2, padding=(1, 0), dilation=1, groups=2)
    assert repr(layer) == (
        "DeformConv2d(8, 6, kernel_size=(3, 2), stride=(2, 2), padding=(1, 0), groups=2)"
    )  # fmt: skip
    assert repr(DeformConv2d(4, 4, 3, dilation=2, bias=False)) == (
        "DeformConv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), dilation=(2, 2), bias=False)"
    )
    assert list(layer.state_dict()) == ["weight", "bias"] and layer.weight.shape == (6, 4, 3, 2)
    # A convolution draws its parameters likewise.
    torch.manual_seed(3)
    plain = torch.nn.Conv2d(8, 6, (3, 2), groups=2)
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)  # type: ignore[arg-type]
    x = torch.randn(1, 8, 5, 4)
    offset, mask = torch.randn(1, 12, 3, 2), torch.rand(1, 6, 3, 2)
    with torch.no_grad():
        y = copy.deepcopy(layer)(x, offset, mask)
    assert_close(y, deform_reference(x, offset, layer.weight, layer.bias, 2, (1, 0), 1, mask).detach(), depth=24)
    for channels, filters in ((7, 6), (8, 5)):
        with pytest.raises(ValueError, match="divisible by groups"):
            DeformConv2d(channels, filters, 3, groups=2)


def test_explain_says_what_it_costs() -> None:
    layer = DeformConv2dPack(4, 6, 3, padding=1, deform_groups=2)
    rows = tritonconv.explain(layer, torch.randn(1, 4, 5, 5)).layers
    assert [(row.kind, row.backend) for row in rows] == [("Conv2d", "triton"), ("DeformConv2dPack", "triton")]
    assert rows[1].reason.startswith("deform_conv") and rows[1].macs == 25 * 9 * 4 * (6 + 4)
