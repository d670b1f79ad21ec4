"""What a random network may do next, each with the value that it is done to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .builder import Builder

__all__ = ["STEPS"]

ACTIVATIONS = (
    "ReLU()", "ReLU(inplace=True)", "LeakyReLU(0.1)", "LeakyReLU(0.0)", "SiLU()", "GELU()", "Hardswish()", "Sigmoid()",
    "Tanh()", "ELU()", "Softplus()", "Mish()", "ReLU6()", "Hardtanh()", "Identity()", "Hardsigmoid(inplace=True)",
)  # fmt: skip
CALLS = (
    "F.relu({})", "torch.relu({})", "{}.relu()", "{}.relu_()", "F.relu({}, inplace=True)", "F.silu({})", "{}.sigmoid()",
    "torch.tanh({})", "F.leaky_relu({}, 0.2)", "F.gelu({}, approximate='tanh')", "F.hardswish({})", "{}.clamp(min=0)",
    "F.relu6({})", "F.elu({})", "{} * torch.sigmoid({})",
)  # fmt: skip


def _nd(t: Tensor) -> int:
    return t.dim() - 2


def convolution(b: Builder, v: str) -> None:
    c, nd = b.values[v].shape[1], _nd(b.values[v])
    groups = b.one(1, 1, 1, c, 2)
    k = groups * b.one(1, 2, 3) if groups > 1 else b.one(2, 3, 4, 6, 8)
    kernel = b.one(1, 1, 2, 3, 3)
    numbers = f"stride={b.one(1, 1, 1, 2)}, padding={b.one(0, 1, 1, kernel // 2)}, groups={groups}, bias={b.chance(0.5)}"
    if c % groups:
        return
    if b.chance(0.15):
        code = f"ConvTranspose{nd}d({c}, {k}, {kernel}, {numbers})"
    else:
        code = f"Conv{nd}d({c}, {k}, {kernel}, {numbers}, dilation={b.one(1, 1, 1, 2)})"
    b.emit(f"{b.module(code)}({v})")


def block(b: Builder, v: str) -> None:
    """Convolution, batch norm, activation; perhaps a residual."""
    c, nd = b.values[v].shape[1], _nd(b.values[v])
    found = b.emit(f"{b.module(f'Conv{nd}d({c}, {c}, 3, padding=1, bias={b.chance(0.3)})')}({v})")
    if found is None:
        return
    norm = b.emit(f"{b.module(f'BatchNorm{nd}d({c})')}({found})")
    if norm is None:
        return
    if b.chance(0.5):
        norm = b.emit(b.one("{} + {}", "torch.add({}, {})", "{}.add({})", "{}.add_({})").format(norm, v)) or norm
    activation(b, norm)


def norm(b: Builder, v: str) -> None:
    t = b.values[v]
    c, nd = t.shape[1], min(3, max(1, _nd(t)))
    codes = [f"BatchNorm{nd}d({c})"] * 3 + [f"GroupNorm({b.one(*(g for g in (1, 2, 3, 4) if c % g == 0))}, {c})"]
    if t.dim() == nd + 2:
        codes.append(f"InstanceNorm{nd}d({c}, affine={b.chance(0.5)}, track_running_stats={b.chance(0.5)})")
    codes.append(f"LayerNorm({t.shape[-1]})")
    b.emit(f"{b.module(b.one(*codes))}({v})")


def activation(b: Builder, v: str) -> None:
    if b.chance(0.5):
        b.emit(f"{b.module(b.one(*ACTIVATIONS), 0.4)}({v})")
    else:
        call = b.one(*CALLS)
        b.emit(call.format(*[v] * call.count("{}")))


def maximum(b: Builder, v: str) -> None:
    """With windows that may lie in the padding alone."""
    nd = _nd(b.values[v])
    # The interpreter's time goes by taps.
    kernel, dilation = (2, b.one(1, 2)) if nd == 3 else (b.one(2, 3, 3), b.one(1, 1, 2, 3))
    padding = b.one(0, kernel // 2)
    if b.chance(0.3):
        # Two taps, one on either side of the shortest axis.
        kernel, padding, dilation = 2, 1, 1 + min(b.values[v].shape[-nd:])
    numbers = f"{kernel}, {b.one(1, 2, 2, 3, 5, 6)}, {padding}, {dilation}"
    ceil = f"ceil_mode={b.chance(0.6)}"
    if b.chance(0.4):
        activation(b, v)
        v = list(b.values)[-1]
    if b.chance(0.7):
        b.emit(f"{b.module(f'MaxPool{nd}d({numbers}, {ceil})')}({v})")
    else:
        b.emit(f"F.max_pool{nd}d({v}, {numbers}, {ceil})")


def pooling(b: Builder, v: str) -> None:
    nd = _nd(b.values[v])
    code = b.one(
        f"AvgPool{nd}d(3, 2, 1, ceil_mode={b.chance(0.5)})", f"AvgPool{nd}d(2, count_include_pad=False)",
        f"AdaptiveAvgPool{nd}d({b.one(1, 1, 2, 3)})", f"AdaptiveMaxPool{nd}d({b.one(1, 2)})", f"LPPool{nd}d(2, 2)",
    )  # fmt: skip
    if b.chance(0.7):
        b.emit(f"{b.module(code)}({v})")
    else:
        b.emit(b.one(f"F.adaptive_avg_pool{nd}d({v}, {b.one(1, 2)})", f"F.avg_pool{nd}d({v}, 2)"))


def resampling(b: Builder, v: str) -> None:
    nd = _nd(b.values[v])
    mode = b.one("nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[nd], "nearest-exact", "area")
    if b.chance(0.4) and mode != "area":
        b.emit(f"{b.module(f'Upsample(scale_factor=2, mode={mode!r})')}({v})")
    else:
        b.emit(f"F.interpolate({v}, {b.one('scale_factor=2', 'size=5', 'scale_factor=1.5')}, mode={mode!r})")


def squeeze_excite(b: Builder, v: str) -> None:
    t = b.values[v]
    c, nd = t.shape[1], _nd(t)
    axes = tuple(range(2, t.dim()))
    if b.chance(0.5):
        s = b.emit(b.one(f"{v}.mean({axes}, keepdim=True)", f"F.adaptive_avg_pool{nd}d({v}, 1)"))
    else:
        s = b.emit(f"{b.module(f'AdaptiveAvgPool{nd}d(1)')}({v})")
    if s is None:
        return
    for code in (
        f"Conv{nd}d({c}, 2, 1)",
        b.one("ReLU()", "SiLU()"),
        f"Conv{nd}d(2, {c}, 1)",
        b.one("Sigmoid()", "Hardsigmoid()"),
    ):
        s = b.emit(f"{b.module(code)}({s})") or s
    gated = b.emit(b.one(f"{v} * {s}", f"{s} * {v}", f"torch.mul({v}, {s})"))
    if gated is not None and b.chance(0.6):
        b.emit(f"{b.module(f'Conv{nd}d({c}, {b.one(2, 3, 4)}, 1)')}({gated})")


def joined(b: Builder, v: str) -> None:
    """A sum, product or concatenation with another value."""
    t = b.values[v]
    other = b.like(v, lambda o: o.shape == t.shape)
    if other is not None and b.chance(0.6):
        b.emit(b.one("{} + {}", "{} * {}", "torch.add({}, {})", "{} - {}", "{}.add_({})").format(v, other))
        return
    other = b.like(v, lambda o: o.dim() == t.dim() > 1 and (o.shape[0], o.shape[2:]) == (t.shape[0], t.shape[2:]))
    if other is not None:
        b.emit(f"torch.cat({b.one('({}, {})', '[{}, {}]').format(v, other)}, {b.one(1, 'dim=1')})")


def stacked(b: Builder, v: str) -> None:
    t = b.values[v]
    other = b.like(v, lambda o: o.shape == t.shape) or v
    made = b.emit(f"torch.stack([{v}, {other}], {b.one(0, 1, 2)})")
    if made is not None and b.chance(0.5):
        averaged(b, made)


def reshaped(b: Builder, v: str) -> None:
    """Another view of the same numbers, and mostly a mean of it."""
    t = b.values[v]
    n, c = t.shape[:2]
    rest = ", ".join(map(str, t.shape[2:]))
    half = c // 2 if c % 2 == 0 else c
    sizes = [
        f"{v}.view({n}, {half}, {c // half}, {rest})", f"{v}.view({n}, -1)", f"{v}.reshape({n}, {c}, -1)",
        f"torch.flatten({v}, {b.one(1, 2)})", f"{v}.flatten({b.one(0, 1, 2)})", f"{v}.unflatten(1, ({half}, -1))",
        f"{v}.unsqueeze({b.one(0, 1, 2, -1)})", f"{v}.squeeze({b.one('', 0, 1, 2, -1)})", f"{v}.unflatten(0, (1, -1))",
        f"{v}.view({v}.size(0), -1)", f"{v}.reshape({v}.shape[0], -1)", f"{v}.unflatten(0, ({n}, 1))",
    ]  # fmt: skip
    made = b.emit(b.r.choice(sizes))
    if made is not None and b.chance(0.5):
        averaged(b, made)


def moved(b: Builder, v: str) -> None:
    rank = b.values[v].dim()
    order = list(range(rank))
    b.r.shuffle(order)
    made = b.emit(b.one(f"{v}.permute({order})", f"{v}.transpose({b.one(0, 1)}, {b.one(1, 2, -1)})", f"{v}.flip(-1)"))
    if made is not None and b.chance(0.5):
        averaged(b, made)
    elif made is not None and b.chance(0.3):
        b.emit(f"{made}.contiguous()")


def taken(b: Builder, v: str) -> None:
    """Fewer axes, and mostly a mean of what is left."""
    made = b.emit(b.one(
        f"{v}[:, 0]", f"{v}[0]", f"{v}.sum(1)", f"{v}.max(1)[0]", f"{v}.max(1).values", f"{v}.mean(1)", f"{v}[:, :, 0]",
        f"{v}.sum({b.one(0, 2, -1)})", f"{v}[..., ::2]", f"{v}[:, ::2]", f"{v}.select(1, 0)", f"{v}.narrow(1, 0, 1)",
    ))  # fmt: skip
    if made is not None and b.chance(0.6):
        averaged(b, made)


def averaged(b: Builder, v: str) -> None:
    rank = b.values[v].dim()
    axes: Any = b.one((-2, -1), (2, 3), (-1, -2), [2, 3], tuple(range(2, max(3, rank))), -1, 2, (1, 2), (-3, -2, -1))
    keep = b.one("", "", ", keepdim=True")
    b.emit(b.one(f"{v}.mean({axes}{keep})", f"torch.mean({v}, {axes}{keep})", f"{v}.mean(dim={axes}{keep})"))


def parted(b: Builder, v: str) -> None:
    if b.values[v].shape[1] % 2 == 0:
        b.emit(b.one(f"{v}.chunk(2, 1)", f"torch.chunk({v}, 2, dim=1)", f"{v}.split({b.values[v].shape[1] // 2}, 1)"), 2)


def rows(b: Builder, v: str) -> None:
    """A linear layer over the last axis."""
    b.emit(f"{b.module(f'Linear({b.values[v].shape[-1]}, {b.one(2, 3, 5)}, bias={b.chance(0.7)})')}({v})")


def dropped(b: Builder, v: str) -> None:
    b.emit(f"{b.module(f'Dropout({b.one(0.1, 0.5)})')}({v})")


Step = Callable[[Builder, str], None]
IMAGES: list[tuple[Step, int]] = [
    (convolution, 5), (block, 3), (norm, 2), (activation, 3), (maximum, 3), (pooling, 2), (resampling, 1),
    (squeeze_excite, 2), (joined, 2), (stacked, 1), (reshaped, 3), (moved, 1), (taken, 2), (averaged, 2), (parted, 1),
    (dropped, 1),
]  # fmt: skip
OTHERS: list[tuple[Step, int]] = [
    (rows, 3), (norm, 1), (activation, 2), (joined, 2), (reshaped, 2), (averaged, 1), (dropped, 1), (taken, 1),
]  # fmt: skip
STEPS = {True: IMAGES, False: OTHERS}
"""By whether a value is a batch of images: steps and how often."""
