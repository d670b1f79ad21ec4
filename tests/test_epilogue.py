"""What follows the product in the same kernel: bias, batch norm, residual, activation; each alone and all together."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DTYPES, ConvCase, make_epilogue, make_tensors
from reference import assert_close, conv_reference

import tritonconv.functional as TF
from tritonconv.ops.conv.call import CONVOLUTIONS
from tritonconv.ops.core.activation import from_module, make_spec, parse_activation, table
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import record_launches

pytestmark = pytest.mark.usefixtures("on_triton")

# With and without a bias, a batch norm, a residual, an activation.
PARTS = list(itertools.product((False, True), repeat=4))

CASE = ConvCase("3x3", (2, 128, 5, 6), (20, 128, 3, 3), "conv_fprop", dict(padding=1))
STEM = ConvCase("stem", (2, 3, 9, 9), (8, 3, 3, 3), "conv_flat", dict(stride=2))
POINTWISE = ConvCase("1x1", (2, 16, 5, 6), (20, 16, 1, 1), "matmul", {})


def run(case: ConvCase, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    arguments = dict(stride=1, padding=0, dilation=1, groups=1) | case.arguments
    norm = epilogue.batch_norm
    tensors = (x, w, epilogue.bias, *((None,) * 4 if norm is None else norm[:4]), epilogue.residual)
    eps = 0.0 if norm is None else norm.eps
    y: torch.Tensor = CONVOLUTIONS["conv"](tensors, ((2, *arguments.values()), "conv2d_bn_act", eps, epilogue.activation))
    return y


@pytest.mark.parametrize("case", [CASE, STEM, POINTWISE], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=lambda p: "".join("01"[v] for v in p))
def test_every_combination_of_parts_in_one_launch(case: ConvCase, parts: tuple[bool, ...], device: str) -> None:
    bias, norm, residual, act = parts
    for channels_last in (False, True):
        x, w = make_tensors(case, torch.float32, device, x_cl=channels_last, w_cl=channels_last)
        y = conv_reference(x, w, **case.arguments).float()
        spec = make_spec("leaky_relu", (0.3,)) if act else None
        epilogue = make_epilogue(
            w.shape[0], y, torch.float32, device, bias=bias, norm=norm, residual=residual, activation=spec
        )
        with record_launches() as launches:
            out = run(case, x, w, epilogue)
        assert launches == [f"{case.kernel}_kernel"]
        assert_close(out, conv_reference(x, w, epilogue, **case.arguments), depth=case.depth)


@pytest.mark.parametrize("name", list(table()))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_activations_are_torchs(name: str, dtype: torch.dtype, device: str) -> None:
    # A 1x1 convolution with the unit matrix leaves the activation alone, over ordinary and extreme values.
    values = torch.cat([torch.linspace(-12, 12, 257), torch.tensor([0.0, 3.0, -3.0, 30.0, -30.0, 6.0, 1e4, -1e4])])
    if name not in ("silu", "hardswish", "mish", "gelu", "gelu_tanh"):
        # Products of zero and infinity: NaN there and in torch, in each its own way.
        values = torch.cat([values, torch.tensor([float("inf"), -float("inf")])])
    values = torch.cat([values, torch.tensor([float("nan")])])
    x = torch.zeros(len(values), 2, 1, 1)
    x[:, 0, 0, 0] = values
    x = x.to(device, dtype)
    w = torch.eye(2, device=device, dtype=dtype)[:1].reshape(1, 2, 1, 1)
    for given in range(len(table()[name].parameters) + 1):
        spec = make_spec(name, (0.5, 4.0)[:given])
        out = TF.conv2d_bn_act(x, w, None, None, None, None, None, activation=spec)
        # The second channel holds zeros, and zero times infinity is NaN in the product itself.
        finite = torch.isfinite(x[:, 0, 0, 0]) | x[:, 0, 0, 0].isnan()
        ref = spec.torch(x[:, :1].double())
        assert_close(out[finite], ref[finite], what=spec)


def test_activations_match_their_modules() -> None:
    for name, row in table().items():
        spec = make_spec(name, tuple(v + 0.5 for _, v in row.parameters))
        numbers = dict(zip((n for n, _ in row.parameters), (spec.a, spec.b), strict=False))
        module = getattr(torch.nn, row.module)(**numbers, **dict(row.fixed))
        assert from_module(module) == spec
        assert parse_activation((name, *numbers.values())) == spec
        x = torch.linspace(-4, 4, 9)
        assert torch.equal(module(x), spec.torch(x))


def test_other_names_of_activations() -> None:
    assert parse_activation("swish") == make_spec("silu")
    assert parse_activation(("clamp", 0.0, 6.0)) == make_spec("hardtanh", (0.0, 6.0))


def test_modules_that_are_no_activations_of_ours_are_not_mistaken() -> None:
    class MyReLU(torch.nn.ReLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    assert from_module(MyReLU()) is None and from_module(torch.nn.Softmax(1)) is None


@pytest.mark.parametrize("bad", ["rleu", ("relu", 1.0), torch.nn.Softmax(1), 3, ("elu", 1.0, 2.0)], ids=str)
def test_unknown_activations_say_which_there_are(bad: object, device: str) -> None:
    x, w = make_tensors(CASE, torch.float32, device)
    with pytest.raises(ValueError, match="activation"):
        TF.conv2d_bn_act(x, w, None, None, None, None, None, activation=bad)


@pytest.mark.parametrize("nd", [1, 2, 3])
def test_conv_bn_act_is_its_parts(nd: int, device: str) -> None:
    x = torch.randn(2, 4, *(7, 6, 5)[:nd], device=device)
    conv = getattr(torch.nn, f"Conv{nd}d")(4, 6, 3, padding=1, device=device)
    norm = getattr(torch.nn, f"BatchNorm{nd}d")(6, device=device).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    residual = torch.randn(2, 6, *(7, 6, 5)[:nd], device=device)
    out = getattr(TF, f"conv{nd}d_bn_act")(
        x, conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, padding=1,
        activation="silu", residual=residual,
    )  # fmt: skip
    ref = torch.nn.functional.silu(norm.double()(conv.double()(x.double())) + residual.double())
    assert_close(out, ref, depth=4 * 3**nd)


def test_batch_norm_without_affine_parameters(device: str) -> None:
    x, w = make_tensors(CASE, torch.float32, device)
    e = make_epilogue(20, x, torch.float32, device, residual=False)
    norm = e.batch_norm._replace(weight=None, bias=None)
    out = TF.conv2d_bn_act(x, w, e.bias, norm.mean, norm.var, None, None, padding=1, eps=norm.eps)
    assert_close(out, conv_reference(x, w, Epilogue(e.bias, norm), padding=1), depth=CASE.depth)


def test_affine_parameters_need_statistics(device: str) -> None:
    x, w = make_tensors(CASE, torch.float32, device)
    with pytest.raises(ValueError, match="running_mean"):
        TF.conv2d_bn_act(x, w, None, None, None, torch.ones(20), None)


def test_statistics_changed_in_any_way_are_seen_at_once(device: str) -> None:
    x, w = make_tensors(CASE, torch.float32, device)
    mean, var = torch.zeros(20, device=device), torch.ones(20, device=device)
    before = TF.conv2d_bn_act(x, w, None, mean, var, None, None, padding=1)
    # .data leaves no trace in a tensor's version: moving averages are written so.
    mean.data.add_(1.0)
    after = TF.conv2d_bn_act(x, w, None, mean, var, None, None, padding=1)
    assert torch.allclose(after, before - 1 / (1 + 1e-5) ** 0.5, atol=1e-5)


def test_residual_in_another_format_is_copied_not_misread(device: str) -> None:
    x, w = make_tensors(CASE, torch.float32, device)
    residual = torch.randn(2, 20, 5, 6, device=device)
    for r in (residual, residual.contiguous(memory_format=torch.channels_last), residual[:1].expand(2, -1, -1, -1)):
        assert_close(
            run(CASE, x, w, Epilogue(residual=r)), conv_reference(x, w, Epilogue(residual=r), padding=1), depth=CASE.depth
        )
