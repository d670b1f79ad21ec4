"""Activations as device functions of an fp32 (or fp64) value and two constexpr parameters, and their gradients.

To add one, write its device function, its gradient of (dy, x, a, b), and its row in ACTIVATIONS: the functional face, the
modules, `convert` and the tests read that table. Comparisons are written so that NaN passes through, as torch has it
(tl.maximum would drop it), and gradients have torch's values at kinks, at infinity and for NaN.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

__all__ = ["ACTIVATIONS", "Activation"]


@triton.jit
def identity(x, a: tl.constexpr, b: tl.constexpr):
    return x


@triton.jit
def hardtanh(x, min_val: tl.constexpr, max_val: tl.constexpr):
    return tl.where(x < min_val, min_val, tl.where(x > max_val, max_val, x))


@triton.jit
def hardtanh_gradient(dy, x, min_val: tl.constexpr, max_val: tl.constexpr):
    return tl.where((x <= min_val) | (x >= max_val), 0.0, dy)


@triton.jit
def relu(x, a: tl.constexpr, b: tl.constexpr):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def relu_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    return tl.where(x <= 0.0, 0.0, dy)


@triton.jit
def relu6(x, a: tl.constexpr, b: tl.constexpr):
    return hardtanh(x, 0.0, 6.0)


@triton.jit
def relu6_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    return hardtanh_gradient(dy, x, 0.0, 6.0)


@triton.jit
def leaky_relu(x, negative_slope: tl.constexpr, b: tl.constexpr):
    return tl.where(x < 0.0, x * negative_slope, x)


@triton.jit
def leaky_relu_gradient(dy, x, negative_slope: tl.constexpr, b: tl.constexpr):
    return tl.where(x > 0.0, dy, dy * negative_slope)


@triton.jit
def elu(x, alpha: tl.constexpr, b: tl.constexpr):
    return tl.where(x < 0.0, alpha * (tl.exp(x) - 1.0), x)


@triton.jit
def elu_gradient(dy, x, alpha: tl.constexpr, b: tl.constexpr):
    return tl.where(x <= 0.0, dy * (alpha * tl.exp(x)), dy)


@triton.jit
def sigmoid(x, a: tl.constexpr, b: tl.constexpr):
    # exp of a non-positive number: no overflow on either side.
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def sigmoid_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    e = tl.exp(-tl.abs(x))
    return dy * (e / ((1.0 + e) * (1.0 + e)))


@triton.jit
def tanh(x, a: tl.constexpr, b: tl.constexpr):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def tanh_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    return sigmoid_gradient(4.0 * dy, 2.0 * x, a, b)


@triton.jit
def silu(x, a: tl.constexpr, b: tl.constexpr):
    return x * sigmoid(x, a, b)


@triton.jit
def silu_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    return dy * (sigmoid(x, a, b) * (1.0 + x * sigmoid(-x, a, b)))


@triton.jit
def gelu(x, a: tl.constexpr, b: tl.constexpr):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return dy * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)


@triton.jit
def gelu_tanh(x, a: tl.constexpr, b: tl.constexpr):
    # 0.5 (1 + tanh(u)) = sigmoid(2 u)
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), a, b)


@triton.jit
def gelu_tanh_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)
    return dy * (sigmoid(u, a, b) * (1.0 + x * (sigmoid(-u, a, b) * slope)))


@triton.jit
def hardsigmoid(x, a: tl.constexpr, b: tl.constexpr):
    return hardtanh(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def hardsigmoid_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    return tl.where((x > -3.0) & (x < 3.0), dy * (1.0 / 6.0), 0.0)


@triton.jit
def hardswish(x, a: tl.constexpr, b: tl.constexpr):
    return x * hardsigmoid(x, a, b)


@triton.jit
def hardswish_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, dy * (x * (1.0 / 3.0) + 0.5), dy))


@triton.jit
def softplus(x, beta: tl.constexpr, threshold: tl.constexpr):
    z = x * beta
    soft = tl.where(z < 0.0, 0.0, z) + tl.log(1.0 + tl.exp(-tl.abs(z)))
    return tl.where(z > threshold, x, soft / beta)


@triton.jit
def softplus_gradient(dy, x, beta: tl.constexpr, threshold: tl.constexpr):
    return tl.where(x * beta > threshold, dy, dy * sigmoid(x * beta, beta, threshold))


@triton.jit
def mish(x, a: tl.constexpr, b: tl.constexpr):
    # tanh(log(1 + e^x)) written with e^-|x|, so that neither tail overflows.
    e = tl.exp(-tl.abs(x))
    n = tl.where(x < 0.0, e * (e + 2.0), 1.0 + 2.0 * e)
    return x * (n / (n + tl.where(x < 0.0, 2.0, 2.0 * e * e)))


@triton.jit
def mish_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    # t + x sigmoid(x) (1 - t^2) with t = n / (n + d), as in `mish`.
    e = tl.exp(-tl.abs(x))
    n = tl.where(x < 0.0, e * (e + 2.0), 1.0 + 2.0 * e)
    d = tl.where(x < 0.0, 2.0, 2.0 * e * e)
    t = n / (n + d)
    return dy * (t + x * (sigmoid(x, a, b) * (1.0 + t) * (d / (n + d))))


@dataclass(frozen=True)
class Activation:
    """One activation and where torch has it.

    `gradient(dy, x, a, b)` is dy times the derivative of `device` at x. `function` is its name in torch.nn.functional,
    `module` its class in torch.nn. `parameters` are the names and defaults of up to two numbers, the same in both. `fixed`
    are keywords that select this form of the function.
    """

    device: object
    gradient: object
    function: str
    module: str
    parameters: tuple[tuple[str, float], ...] = ()
    fixed: tuple[tuple[str, str], ...] = ()


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(relu, relu_gradient, "relu", "ReLU"),
    "relu6": Activation(relu6, relu6_gradient, "relu6", "ReLU6"),
    "leaky_relu": Activation(leaky_relu, leaky_relu_gradient, "leaky_relu", "LeakyReLU", (("negative_slope", 0.01),)),
    "elu": Activation(elu, elu_gradient, "elu", "ELU", (("alpha", 1.0),)),
    "sigmoid": Activation(sigmoid, sigmoid_gradient, "sigmoid", "Sigmoid"),
    "tanh": Activation(tanh, tanh_gradient, "tanh", "Tanh"),
    "silu": Activation(silu, silu_gradient, "silu", "SiLU"),
    "gelu": Activation(gelu, gelu_gradient, "gelu", "GELU", fixed=(("approximate", "none"),)),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_gradient, "gelu", "GELU", fixed=(("approximate", "tanh"),)),
    "hardswish": Activation(hardswish, hardswish_gradient, "hardswish", "Hardswish"),
    "hardsigmoid": Activation(hardsigmoid, hardsigmoid_gradient, "hardsigmoid", "Hardsigmoid"),
    "mish": Activation(mish, mish_gradient, "mish", "Mish"),
    "softplus": Activation(softplus, softplus_gradient, "softplus", "Softplus", (("beta", 1.0), ("threshold", 20.0))),
    "hardtanh": Activation(hardtanh, hardtanh_gradient, "hardtanh", "Hardtanh", (("min_val", -1.0), ("max_val", 1.0))),
}
