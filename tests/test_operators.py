"""The registered operator: opcheck, torch.compile, export, fake tensors, autocast, FLOP counts."""

from __future__ import annotations

import pytest
import torch
from matrix import every, rotate, some
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.launch import record_launches

pytestmark = pytest.mark.usefixtures("on_triton")

NUMBERS = dict(
    stride=[2, 1], padding=[1, 1], padding_name="", dilation=[1, 1], groups=1, eps=1e-5, activation="", a=0.0, b=0.0,
    kind="conv",
)  # fmt: skip


def tensors(device: str, channels_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 8, 6, 5, device=device).contiguous(memory_format=memory_format)
    return x, torch.randn(4, 8, 3, 3, device=device)


@rotate(channels_last=[False, True], fused=[False, True])
def test_opcheck(channels_last: bool, fused: bool, device: str) -> None:
    x, w = tensors(device, channels_last)
    k = torch.rand(4, 4, device=device).unbind()
    optional = (k[0], *k, torch.randn(2, 4, 3, 5, device=device)) if fused else (None,) * 6
    numbers = NUMBERS | (dict(activation="leaky_relu", a=0.1) if fused else {})
    torch.library.opcheck(torch.ops.tritonconv.conv.default, (x, w, *optional), numbers)


@rotate(dynamic=[False, True], channels_last=[False, True])
def test_compile_fullgraph(dynamic: bool, channels_last: bool, device: str) -> None:
    torch._dynamo.reset()
    x, w = tensors(device, channels_last)
    mean, var = torch.rand(2, 4, device=device).unbind()

    def model(x: torch.Tensor) -> torch.Tensor:
        y = TF.conv2d_bn_act(x, w, None, mean, var, None, None, padding="same", activation="silu")
        return TF.linear(y.mean((2, 3)), w[:, :4, 0, 0])

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3) if dynamic else (2,):
        inputs = x[:1].expand(batch, -1, -1, -1)
        with record_launches() as launches:
            out = compiled(inputs)
        assert launches == ["conv_flat_kernel", "matmul_kernel"]
        assert torch.allclose(out, model(inputs), atol=1e-6)


@every(nd=some([2, 1, 3], 1))
def test_modules_compile_and_export(nd: int, device: str) -> None:
    torch._dynamo.reset()
    block = getattr(tritonconv.nn, f"ConvBNAct{nd}d")(4, 6, 3, stride=2, activation="hardswish", device=device).eval()
    x = torch.randn(2, 4, *(9, 8, 7)[:nd], device=device)
    expected = block(x)
    assert torch.allclose(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-6)
    program = torch.export.export(block, (x,))
    assert any("tritonconv.conv" in str(node.target) for node in program.graph.nodes)
    assert torch.allclose(program.module()(x), expected, atol=1e-6)


def test_unbatched_input_compiles(device: str) -> None:
    torch._dynamo.reset()
    x, w = tensors(device, False)
    compiled = torch.compile(TF.conv2d, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x[0], w), TF.conv2d(x[0], w), atol=1e-6)


def test_gradients_compile_on_torch(device: str) -> None:
    torch._dynamo.reset()
    x, w = tensors(device, False)
    w.requires_grad_()
    with torch.enable_grad(), tritonconv.set_backend("auto"):
        torch.compile(TF.conv2d, fullgraph=True, backend="aot_eager")(x, w).sum().backward()
    assert w.grad is not None


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_fake_tensors_have_the_true_strides(channels_last: bool, device: str) -> None:
    x, w = tensors(device, channels_last)
    with FakeTensorMode() as mode:
        fake = TF.conv2d(mode.from_tensor(x), mode.from_tensor(w), padding=1)
    real = TF.conv2d(x, w, padding=1)
    assert fake.shape == real.shape and fake.stride() == real.stride() and fake.dtype == real.dtype


def test_flops_are_counted_as_torchs(device: str) -> None:
    x, w = tensors(device, False)
    with FlopCounterMode(display=False) as ours:
        TF.conv2d(x, w, stride=2, groups=1)
        TF.linear(x, w[:, :5, 0, 0])
    with FlopCounterMode(display=False) as theirs:
        torch.nn.functional.conv2d(x, w, stride=2)
        torch.nn.functional.linear(x, w[:, :5, 0, 0])
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


def test_autocast_reaches_the_operator(device: str) -> None:
    x, w = tensors(device, False)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype):
            out = torch.ops.tritonconv.conv(x, w, *(None,) * 6, **NUMBERS)
        assert out.dtype == dtype


def test_bad_arguments_raise_from_the_operator_too(device: str) -> None:
    x, w = tensors(device, False)
    with pytest.raises(RuntimeError, match="non-positive stride"):
        torch.ops.tritonconv.conv(x, w, *(None,) * 6, **(NUMBERS | dict(stride=[0])))
    with pytest.raises(RuntimeError, match="should be the same"):
        torch.ops.tritonconv.conv(x, w.double(), *(None,) * 6, **NUMBERS)
