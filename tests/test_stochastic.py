"""Stochastic pooling: drawn elements, weighted means and gradients, against a plain definition and torch's own path."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from matrix import TEST_ALL, cover, rotate
from reference import assert_close
from tritonconv.kernels import stochastic_pool as kernels

import tritonconv
from tritonconv.functional import stochastic_pool2d
from tritonconv.ops import stochastic as launches_of
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import as_format, is_dense, suggests_channels_last

F = torch.nn.functional
OPS = torch.ops.tritonconv
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# kernel_size, stride, padding, ceil_mode
WINDOWS = [
    (2, None, 0, False),
    (3, 2, 1, True),
    ((3, 2), 1, (1, 0), False),
    (2, 3, 0, True),
    ((1, 4), (2, 2), (0, 2), False),
]


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


def inputs(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str) -> torch.Tensor:
    return as_format(torch.randn(shape, device=device).to(dtype), channels_last)


def definition(x: torch.Tensor, u: torch.Tensor | None, window: Any) -> torch.Tensor:
    """One window after the other, in Python's fp64; u is None in eval mode."""
    (r, s), (sh, sw), (ph, pw) = (
        (v, v) if isinstance(v, int) else v for v in (window[0], window[1] or window[0], window[2])
    )
    p, q = F.max_pool2d(x.float(), *window[:3], ceil_mode=window[3]).shape[2:]
    y = torch.zeros(*x.shape[:2], p, q, dtype=torch.float64)
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, y.shape)).tolist():
        rows = range(max(0, i * sh - ph), min(x.shape[2], i * sh - ph + r))
        columns = range(max(0, j * sw - pw), min(x.shape[3], j * sw - pw + s))
        weights = [max(0.0, x[n, c, h, w].item()) for h in rows for w in columns]
        total = math.fsum(weights)
        if total == 0:
            continue
        if u is None:
            y[n, c, i, j] = math.fsum(v * v for v in weights) / total
            continue
        running, share = 0.0, u[n, c, i, j].item() * total
        for v in weights:
            running += v
            if v > 0 and running > share:
                y[n, c, i, j] = v
                break
    return y


def run(x: torch.Tensor, window: Any, training: bool, dy: torch.Tensor | None = None, seed: int = 3) -> list[torch.Tensor]:
    """[y, dx]"""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = stochastic_pool2d(x, *window, training=training)
    dy = torch.linspace(-1, 1, y.numel(), device=x.device).reshape(y.shape) if dy is None else dy
    return [y.detach(), *torch.autograd.grad(y, x, dy.to(y.dtype))]


def compared(x: torch.Tensor, window: Any, what: object) -> None:
    """Drawn elements and their gradients as torch's path has them; means as it has them in fp64."""
    drawn, mean = run(x, window, True), run(x, window, False)
    with tritonconv.set_backend("torch"):
        theirs, wide = run(x, window, True), run(x.double(), window, False)
    assert torch.equal(drawn[0], theirs[0]), what
    assert_close(drawn[1], theirs[1].double(), depth=9, what=what)
    for out, ref in zip(mean, wide, strict=True):
        assert_close(out, ref, depth=9, what=what)
    for training, (y, _) in ((True, drawn), (False, mean)):
        torch.manual_seed(3)
        with torch.no_grad():
            assert torch.equal(stochastic_pool2d(x, *window, training=training), y), what


@rotate(window=WINDOWS, channels_last=[False, True])
def test_both_paths_draw_the_same(window: Any, channels_last: bool, device: str) -> None:
    x = inputs((1, 12, 4, 7), torch.float32, channels_last, device)
    compared(x, window, window)
    y, dx = run(x, window, True)
    assert is_dense(y, suggests_channels_last(x)) and dx.stride() == x.stride()


@rotate(dtype=DTYPES[1:], channels_last=[False, True])
def test_the_other_dtypes(channels_last: bool, dtype: torch.dtype, device: str) -> None:
    compared(inputs((1, 12, 4, 6), dtype, channels_last, device), (2, None, 0, False), dtype)


@rotate(window=WINDOWS[1:4], backend=["triton", "torch"])
def test_the_definition(backend: Any, window: Any, device: str) -> None:
    # Sums of small integers are exact, and no number lies on a border.
    x = torch.randint(-3, 6, (2, 3, 5, 6), device=device).float()
    with tritonconv.set_backend(backend):
        torch.manual_seed(5)
        y = stochastic_pool2d(x, *window)
        torch.manual_seed(5)
        u = torch.rand(y.shape, device=device)
        assert torch.equal(y.double().cpu(), definition(x, u, window))
        assert_close(stochastic_pool2d(x, *window, training=False).cpu(), definition(x, None, window), depth=9)


def test_frequencies_are_the_probabilities(device: str) -> None:
    x = torch.tensor([1.0, 0.0, 3.0, -5.0, 4.0, 2.0], device=device).reshape(1, 1, 2, 3).expand(1, 20000, 2, 3)
    y = stochastic_pool2d(x, (2, 3)).flatten()
    counts = torch.tensor([(y == v).float().mean().item() for v in (1.0, 3.0, 4.0, 2.0)])
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.3, 0.4, 0.2]), atol=0.015, rtol=0)
    assert not ((y == 0.0) | (y == -5.0)).any()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_windows_without_a_weight_give_zero(backend: Any, training: bool, device: str) -> None:
    x = -torch.rand(1, 2, 4, 4, device=device)
    with tritonconv.set_backend(backend):
        y, dx = run(x, (2, None, 0, False), training)
    assert (y == 0).all() and (dx == 0).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sums_that_are_not_finite_give_nan(backend: Any, training: bool, device: str) -> None:
    x = torch.rand(1, 4, 4, 4, device=device) + 0.5
    x[0, 0, 0, 0], x[0, 1, 1, 3], x[0, 2, 3, 3] = float("nan"), float("inf"), -float("inf")
    with tritonconv.set_backend(backend):
        y, dx = run(x, (2, None, 0, False), training)
    assert y.isnan().nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 0, 1]]
    assert dx[0, 2:].isfinite().all()
    if training:
        # No element was drawn there.
        assert (dx[0, 0, :2, :2] == 0).all() and (dx[0, 1, :2, 2:] == 0).all()


def test_the_gradient_goes_to_the_drawn_element(device: str) -> None:
    # Each element's value is its own.
    x = torch.rand(1, 8, 6, 6, device=device) + 0.1
    y, dx = run(x, (3, None, 0, False), True, torch.ones(1, 8, 2, 2, device=device))
    assert torch.equal(dx.count_nonzero(), torch.tensor(32, device=device))
    torch.testing.assert_close((dx * x).sum(), y.sum())


def test_a_seed_or_a_generator_settles_the_choice(device: str) -> None:
    x = torch.rand(1, 16, 8, 8, device=device)
    first, second, other = (run(x, (2, None, 0, False), True, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    generated = [
        stochastic_pool2d(x, 2, generator=torch.Generator(device).manual_seed(1)) for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*generated) and torch.equal(generated[0], first)


@rotate(config=cover(kernels.configs()), channels_last=[False, True])
def test_every_candidate_config(config: object, channels_last: bool, device: str) -> None:
    x = inputs((1, 20, 2, 19), torch.float32, channels_last, device)
    expected = [run(x, (2, 2, 1, False), training) for training in (True, False)]
    with forced(config=config):
        torch.testing.assert_close([run(x, (2, 2, 1, False), training) for training in (True, False)], expected)


def test_64_bit_offsets_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for channels_last in (False, True):
        x = inputs((2, 6, 2, 5), torch.float32, channels_last, device)
        for training in (True, False):
            narrow = run(x, (2, 1, 1, False), training)
            with monkeypatch.context() as patch:
                patch.setattr(launches_of, "needs_int64", lambda _elements: True)
                assert all(map(torch.equal, narrow, run(x, (2, 1, 1, False), training)))


def test_inputs_of_any_strides(device: str) -> None:
    last = inputs((2, 16, 4, 5), torch.float32, True, device)
    odd = [last[:, 4:12], last[:, :, ::2], last.contiguous()[:, 2:4, :, 1:], last.permute(3, 1, 2, 0)[:1, :4]]
    for x in (*odd, torch.rand(1, 3, 1, 1, device=device).expand(2, 3, 2, 4)):
        compared(x, (2, None, 0, False), x.stride())


def test_a_seeded_fuzz(device: str) -> None:
    draw = random.Random(11)
    for _ in range(6 if TEST_ALL else 3):
        kernel = draw.randint(1, 3), draw.randint(1, 4)
        window = (kernel, (draw.randint(1, 3), draw.randint(1, 3)), tuple(draw.randint(0, k // 2) for k in kernel))
        shape = (1, draw.choice((1, 5, 8)), draw.randint(3, 6), draw.randint(4, 8))
        x = inputs(shape, draw.choice(DTYPES), draw.random() < 0.5, device)
        compared(x, (*window, draw.random() < 0.5), (shape, window, x.dtype))


def test_unbatched_and_empty(device: str) -> None:
    x = torch.rand(3, 6, 6, device=device)
    torch.manual_seed(1)
    y = stochastic_pool2d(x, 2)
    torch.manual_seed(1)
    assert torch.equal(y, stochastic_pool2d(x[None], 2)[0]) and y.shape == (3, 3, 3)
    for training in (True, False):
        assert stochastic_pool2d(torch.rand(0, 3, 6, 6, device=device), 2, training=training).shape == (0, 3, 3, 3)


def test_gradcheck_of_the_mean(device: str) -> None:
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: stochastic_pool2d(t, 3, 2, 1, training=False), x, fast_mode=True)


def test_operators_are_clean(device: str) -> None:
    x = as_format(torch.rand(1, 4, 5, 4, device=device), True).requires_grad_()
    window = ([2, 2], [2, 2], [0, 0], False)
    u = as_format(torch.rand(1, 4, 2, 2, device=device), True)
    torch.library.opcheck(OPS.stochastic_pool, (x, u, *window))
    torch.library.opcheck(OPS.stochastic_pool, (x, None, *window))
    with pytest.raises(RuntimeError, match=r"expected u of size \[1, 4, 2, 2\]"):
        OPS.stochastic_pool(x, u[:, :2], *window)


def test_compiled_pools_run_on_our_kernels(device: str) -> None:
    layer = tritonconv.nn.StochasticPool2d(2)
    x = torch.rand(2, 4, 6, 6, device=device, requires_grad=True)
    with record_launches() as launches:
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
    assert launches == ["stochastic_kernel", "stochastic_backward_kernel"]
    torch.testing.assert_close((x.grad * x).sum(), y.sum())


def test_the_module(device: str) -> None:
    layer = tritonconv.nn.StochasticPool2d(3, padding=1)
    assert repr(layer) == "StochasticPool2d(kernel_size=3, stride=3, padding=1, ceil_mode=False)"
    x = torch.rand(2, 4, 6, 6, device=device)
    assert layer(x).shape == (2, 4, 2, 2) and not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), stochastic_pool2d(x, 3, padding=1, training=False))
    layer.backend = "torch"
    with tritonconv.set_backend("auto"), record_launches() as launches:
        layer(x)
        row = tritonconv.explain(layer, x).to_dict()["layers"][0]
    assert not launches and row["backend"] == "torch"


BAD_CALLS: list[tuple[str, Any, type[Exception]]] = [
    ("no tensor", lambda: stochastic_pool2d(None, 2), TypeError),
    ("too few axes", lambda: stochastic_pool2d(torch.zeros(4, 4), 2), RuntimeError),
    ("integers", lambda: stochastic_pool2d(torch.zeros(1, 1, 4, 4).int(), 2), RuntimeError),
    ("a window of nothing", lambda: stochastic_pool2d(torch.zeros(1, 1, 4, 4), 0), RuntimeError),
    ("too much padding", lambda: stochastic_pool2d(torch.zeros(1, 1, 4, 4), 2, 1, 2), RuntimeError),
    ("too large a window", lambda: stochastic_pool2d(torch.zeros(1, 1, 4, 4), 5), RuntimeError),
    ("a float", lambda: stochastic_pool2d(torch.zeros(1, 1, 4, 4), 2.0), TypeError),
]


@pytest.mark.parametrize(("call", "error"), [pytest.param(call, error, id=name) for name, call, error in BAD_CALLS])
def test_bad_calls(call: Any, error: type[Exception]) -> None:
    with record_launches() as launches, pytest.raises(error):
        call()
    assert not launches
