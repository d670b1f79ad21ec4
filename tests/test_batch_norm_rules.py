"""Batch norm's rules: activations behind it, operators, autograd, torch.compile, modules and errors, as torch has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from matrix import rotate
from norms import BACKWARD, FORWARD, Layer
from reference import assert_close

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.activation import parse_activation, table
from tritonconv.ops.core.launch import record_launches

F = torch.nn.functional
OPS = torch.ops.tritonconv


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


def gradient_of(function: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


ACTIVATIONS = [*table(), ("leaky_relu", 0.3), ("softplus", 2.0, 5.0), ("hardtanh", -0.5, 2.0), ("elu", 0.7)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_activations_gradient_is_torchs_everywhere(activation: object, device: str) -> None:
    spec = parse_activation(activation)
    # Kinks of all of them, both tails, and what is not finite.
    points = [-1e4, -60, -20, -6, -3, -1, -0.5, -1e-30, 0, 1e-30, 0.5, 1, 2, 2.5, 2.6, 3, 6, 20, 20.5, 60, 1e4]
    grid = torch.tensor([*points, float("inf"), -float("inf"), float("nan")], dtype=torch.float64, device=device)
    x = torch.cat([grid, torch.linspace(-9, 9, 101, dtype=torch.float64, device=device)])[:, None].requires_grad_()
    zero, one = torch.zeros(1, dtype=torch.float64, device=device), torch.ones(1, dtype=torch.float64, device=device)
    y = OPS.batch_norm_eval(x, zero, one, None, None, None, eps=0.0, activation=spec.name, a=spec.a, b=spec.b)
    (ours,) = torch.autograd.grad(y.sum(), x)
    # One by one, for torch's vector code on CPUs differs from all its other code where x is NaN.
    theirs = torch.cat([gradient_of(spec.torch, one) for one in x.detach().split(1)])
    # Torch's sixth is an fp32 one.
    rtol = 1e-7 if spec.name == "hardsigmoid" else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-14, equal_nan=True)


@rotate(activation=["", "relu", "silu"], residual=[False, True], training=[True, False])
def test_residual_and_activation_behind_it(activation: str, residual: bool, training: bool, device: str) -> None:
    layer = Layer.random((3, 9, 6, 5), torch.bfloat16, True, device)
    r = torch.randn(3, 9, 6, 5, device=device).bfloat16() if residual else None
    numbers: dict[str, Any] = dict(eps=1e-5, activation=activation, a=0.0, b=0.0)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (layer.x, layer.weight, layer.bias, r)]
    if training:
        y = OPS.batch_norm_train(*leaves, **numbers, group="")[0]
    else:
        y = OPS.batch_norm_eval(leaves[0], layer.running_mean, layer.running_var, *leaves[1:], **numbers)
    ours = [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], layer.dy)]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    running = layer.running_mean.double(), layer.running_var.double()
    v = F.batch_norm(wide[0], *running, *wide[1:3], training=training)
    v = v if wide[3] is None else v + wide[3]
    v = getattr(F, activation)(v) if activation else v
    reference = [v, *torch.autograd.grad(v, [t for t in wide if t is not None], layer.dy.double())]
    for out, ref in zip(ours, reference, strict=True):
        assert_close(out, ref, depth=90)


def test_gradcheck(device: str) -> None:
    for shape in ((5, 3), (2, 3, 4), (2, 3, 2, 2, 3)):
        x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        w, b = (torch.randn(3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
        mean, var = torch.randn(3, dtype=torch.float64, device=device), torch.ones(3, dtype=torch.float64, device=device)
        assert torch.autograd.gradcheck(lambda *t: TF.batch_norm(t[0], None, None, *t[1:], True), (x, w, b), fast_mode=True)
        running = mean, var

        def frozen(x: torch.Tensor, *affine: torch.Tensor, running: Any = running) -> torch.Tensor:
            return TF.batch_norm(x, *running, *affine)

        assert torch.autograd.gradcheck(frozen, (x, w, b), fast_mode=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_second_derivative_is_torchs(training: bool, device: str) -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in ((4, 3, 5), (3,), (3,)))
    mean, var = torch.randn(3, dtype=torch.float64, device=device), torch.ones(3, dtype=torch.float64, device=device)
    found = []
    for module in (TF, F):
        y = module.batch_norm(x, mean.clone(), var.clone(), w, b, training)
        first = torch.autograd.grad(y.pow(3).sum(), (x, w, b), create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b))])
    torch.testing.assert_close(*found)


def test_operators_are_clean(device: str) -> None:
    x = torch.randn(2, 4, 5, 3, device=device).to(memory_format=torch.channels_last).requires_grad_()
    w, b, mean = (torch.randn(4, device=device, requires_grad=True) for _ in range(3))
    r, mean, var, count = torch.randn_like(x), mean.detach(), torch.rand(4, device=device), torch.ones(1, device=device)
    numbers: dict[str, Any] = dict(eps=1e-5, activation="silu", a=0.0, b=0.0)
    plain = numbers | dict(activation="")
    torch.library.opcheck(OPS.batch_norm_train, (x, w, b, r.requires_grad_()), dict(**numbers, group=""))
    torch.library.opcheck(OPS.batch_norm_train, (x, None, None, None), dict(**plain, group=""))
    torch.library.opcheck(OPS.batch_norm_eval, (x, mean, var, w, None, r), numbers)
    torch.library.opcheck(OPS.update_running_stats, (mean, var, count, mean.clone(), None, 0.1))
    needs = dict(needs_x=True, needs_weight=True, needs_bias=False, needs_residual=True)
    tensors = [t.detach() for t in (r, x, mean, var, count, w, b, r)]
    torch.library.opcheck(OPS.batch_norm_backward, tuple(tensors), dict(**numbers, group="", **needs))


def test_compiled_training_runs_on_our_kernels(device: str) -> None:
    ours = torch.nn.Sequential(tritonconv.nn.BatchNorm2d(4), torch.nn.ReLU(), tritonconv.nn.BatchNorm2d(4)).to(device)
    eager = copy.deepcopy(ours)
    x = torch.randn(3, 4, 5, 5, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with record_launches() as launches:
        compiled(x).square().sum().backward()
    assert set(launches) == {*FORWARD, "batch_norm_running_kernel", *BACKWARD}
    eager(x).square().sum().backward()
    for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.state_dict(), eager.state_dict())
    ours.eval(), eager.eval()
    torch.testing.assert_close(compiled(x), eager(x))


def test_autocast_leaves_the_dtype_as_torch_does(device: str) -> None:
    layer = tritonconv.nn.BatchNorm2d(4, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(device, torch.bfloat16):
            y = layer(torch.randn(2, 4, 3, 3, device=device, dtype=dtype))
        y.sum().backward()
        assert y.dtype == dtype and layer.weight.grad.dtype == torch.float32


def test_a_running_statistic_that_moved_is_noticed(device: str) -> None:
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    y = TF.batch_norm(x, mean, var)
    with torch.no_grad():
        TF.batch_norm(x, mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(momentum=None), dict(affine=False), dict(track_running_stats=False), dict(eps=0.1, momentum=0.5)],
    ids=str,
)
def test_modules_are_torchs_twins(name: str, options: dict[str, Any], device: str) -> None:
    ours, theirs = (getattr(n, name)(5, **options, device=device) for n in (tritonconv.nn, torch.nn))
    assert isinstance(ours, getattr(torch.nn, name)) and repr(ours) == repr(theirs)
    nd = int(name[9]) if name[9].isdigit() else 2
    for training in (True, True, False):
        x = torch.randn(3, 5, *(4,) * nd, device=device)
        ours.train(training), theirs.train(training)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError) as error:
        theirs(torch.randn(5, device=device))
    with pytest.raises(ValueError, match=r".") as raised:
        ours(torch.randn(5, device=device))
    assert str(raised.value) == str(error.value)


def test_a_layers_own_backend(device: str) -> None:
    layer = tritonconv.nn.BatchNorm1d(3, device=device)
    layer.backend = "torch"
    with tritonconv.set_backend("auto"), record_launches() as launches:
        layer(torch.randn(4, 3, device=device))
    assert not launches


def v(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype)


X = (2, 4, 3, 3)
BAD_CALLS: list[tuple[str, Any]] = [
    ("one value a channel", lambda F: F.batch_norm(torch.zeros(1, 4, 1, 1), None, None, training=True)),
    ("one row", lambda F: F.batch_norm(torch.zeros(1, 4), v(4), v(4), training=True)),
    ("no statistics in eval mode", lambda F: F.batch_norm(torch.zeros(X), None, None)),
    ("a statistic missing in eval mode", lambda F: F.batch_norm(torch.zeros(X), v(4), None)),
    ("running mean too short", lambda F: F.batch_norm(torch.zeros(X), v(3), v(4), training=True)),
    ("running var too long", lambda F: F.batch_norm(torch.zeros(X), v(4), v(5))),
    ("weight too short", lambda F: F.batch_norm(torch.zeros(X), v(4), v(4), v(3))),
    ("bias too short", lambda F: F.batch_norm(torch.zeros(X), v(4), v(4), v(4), v(3))),
    ("no channels axis", lambda F: F.batch_norm(torch.zeros(4), v(4), v(4))),
    ("one running statistic", lambda F: F.batch_norm(torch.zeros(X), v(4), None, training=True)),
    ("negative eps", lambda F: F.batch_norm(torch.zeros(X), v(4), v(4), eps=-1.0)),
    ("no tensor", lambda F: F.batch_norm(None, v(4), v(4))),
    ("integers", lambda F: F.batch_norm(torch.zeros(X).int(), v(4), v(4))),
    ("weight of another dtype", lambda F: F.batch_norm(torch.zeros(X), v(4), v(4), v(4, torch.float64))),
    ("statistics of 16 bits", lambda F: F.batch_norm(torch.zeros(X), v(4, torch.half), v(4, torch.half), training=True)),
]


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in BAD_CALLS])
@pytest.mark.filterwarnings("ignore:tritonconv")
def test_bad_calls_raise_torchs_exception(call: Any) -> None:
    with pytest.raises(Exception) as theirs:
        call(F)
    with tritonconv.set_backend("auto"), record_launches() as launches, pytest.raises(type(theirs.value)) as ours:
        call(TF)
    assert str(ours.value) == str(theirs.value) and not launches


def test_operators_check_sizes(device: str) -> None:
    x, numbers = torch.zeros(X, device=device), dict(eps=1e-5, activation="", a=0.0, b=0.0)
    with pytest.raises(RuntimeError, match=r"weight should contain 4 elements, not 3 of size \[3\]"):
        OPS.batch_norm_train(x, torch.zeros(3, device=device), None, None, **numbers, group="")
    with pytest.raises(RuntimeError, match=r"of the input's size \[2, 4, 3, 3\], but got \[2, 4\]"):
        OPS.batch_norm_train(x, None, None, torch.zeros(2, 4, device=device), **numbers, group="")


def test_what_no_kernel_supports_is_said(device: str) -> None:
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match=r"parameters of torch.float32 and torch.float64 together have no kernel"):
        TF.batch_norm(torch.zeros(X, device=device), mean, var, mean.double(), training=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("function", ["batch_norm", "conv2d_bn_act"])
def test_vectors_may_be_columns_of_wider_tensors(
    function: str, training: bool, channels_last: bool, backend: str, device: str
) -> None:
    """Torch's own channels-last gradient reads a column's weight as if it lay side by side."""
    layer = Layer.random((4, 5, 6, 7), torch.float32, channels_last, device)
    filters = torch.eye(5, device=device)[:, :, None, None]

    def run(on: Any, columns: bool, wide: bool) -> list[torch.Tensor]:
        values = [layer.running_mean, layer.running_var, layer.weight, layer.bias]
        mean, var, *affine = (t.double() if wide else t for t in values)
        if columns:
            mean, var, *affine = (torch.stack((t, t + 9, t - 9), 1)[:, 0] for t in (mean, var, *affine))
        x, *affine = (t.detach().requires_grad_() for t in (layer.x.double() if wide else layer.x, *affine))
        if on is F or function == "batch_norm":
            y = on.batch_norm(x, mean, var, *affine, training)
        else:
            y = on.conv2d_bn_act(x, filters, None, mean, var, *affine, training=training)
        return [y.detach(), *torch.autograd.grad(y, (x, *affine), layer.dy.to(y.dtype)), mean, var]

    with tritonconv.set_backend(backend):
        ours = run(TF, True, False)
    for out, ref in zip(ours, run(F, False, True), strict=True):
        assert_close(out, ref, depth=1000)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_empty_batch_is_torchs(shape: tuple[int, ...], training: bool, device: str) -> None:
    results = []
    for module in (TF, F):
        x, w = torch.randn(shape, device=device, requires_grad=True), torch.ones(4, device=device, requires_grad=True)
        mean, var = torch.ones(4, device=device), torch.ones(4, device=device)
        y = module.batch_norm(x, mean, var, w, None, training)
        y.sum().backward()
        results.append((y, x.grad, w.grad, mean, var))
    torch.testing.assert_close(*results)


def test_explain_sees_the_layer_and_runs_nothing(device: str) -> None:
    layer = tritonconv.nn.BatchNorm2d(4, device=device)
    with record_launches() as launches:
        row = tritonconv.explain(layer, torch.randn(2, 4, 5, 5, device=device)).to_dict()["layers"][0]
    assert not launches and row["backend"] == "triton" and "batch_norm" in row["reason"]


def test_which_kernels_run(device: str) -> None:
    layer = Layer.random((2, 4, 5, 5), device=device)
    running = layer.running_mean, layer.running_var
    with record_launches() as launches, torch.no_grad():
        TF.batch_norm(layer.x, *running, layer.weight, layer.bias, True)
    assert launches == [*FORWARD, "batch_norm_running_kernel"]
    with record_launches() as launches, torch.no_grad():
        TF.batch_norm(layer.x, *running, layer.weight, layer.bias)
    assert launches == FORWARD[2:]
    with record_launches() as launches:
        layer.run(TF, True)
    assert launches == [*FORWARD, "batch_norm_running_kernel", *BACKWARD]
    # Frozen: statistics and parameters are constants, and nothing is summed.
    x = layer.x.clone().requires_grad_()
    with record_launches() as launches:
        TF.batch_norm(x, *running, layer.weight, layer.bias).sum().backward()
    assert launches == [FORWARD[2], *BACKWARD[2:]]


def test_what_is_saved_is_what_torch_saves(device: str) -> None:
    def saved(module: Any, training: bool) -> int:
        layer = Layer.random((4, 8, 9, 9), device=device)
        seen: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            arguments = (layer.running_mean, layer.running_var, layer.weight.requires_grad_(), layer.bias.requires_grad_())
            module.batch_norm(layer.x.requires_grad_(), *arguments, training)
        return sum(t.numel() for t in seen)

    for training in (True, False):
        # One number more is the count.
        assert saved(TF, training) <= saved(F, training) + 8 + 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_unit_sizes_do_not_hide_a_channels_last_input(training: bool, device: str) -> None:
    x = torch.randn(8, 4, 12, device=device).permute(0, 2, 1).unsqueeze(-1)
    mean, var = torch.zeros(12, device=device), torch.ones(12, device=device)
    for given in (x, x.detach().requires_grad_()):
        ours, theirs = (on.batch_norm(given, mean.clone(), var.clone(), training=training) for on in (TF, F))
        assert ours.stride()[:3] == theirs.stride()[:3] == (48, 1, 12)
        torch.testing.assert_close(ours, theirs)


def test_a_converted_model_with_vectors_in_columns(device: str) -> None:
    def columns(t: torch.Tensor) -> torch.Tensor:
        return torch.stack((t, t + 9), 1)[:, 0]

    layers = torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.ReLU()
    model = torch.nn.Sequential(*layers).to(device)
    norm = model[1]
    for t in (norm.weight, norm.bias):
        torch.nn.init.uniform_(t, 0.5, 1.5)
    wide = copy.deepcopy(model).double()
    norm.weight.data, norm.bias.data = columns(norm.weight.data), columns(norm.bias.data)
    norm.running_mean, norm.running_var = columns(norm.running_mean), columns(norm.running_var)
    image = torch.randn(2, 3, 8, 8, device=device)
    found = []
    for each in (tritonconv.convert(model), wide):
        x = image.to(each[0].weight.dtype, copy=True).requires_grad_()
        each(x).pow(2).sum().backward()
        parameters = [p.grad for p in each.parameters() if p is not each[0].bias]
        found.append([x.grad, *parameters, each[1].running_mean, each[1].running_var])
    for out, ref in zip(*found, strict=True):
        torch.testing.assert_close(out.double(), ref, rtol=1e-4, atol=1e-4)
