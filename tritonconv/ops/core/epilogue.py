"""The epilogue of a convolution in the same kernel: bias, batch norm in eval mode, residual, activation."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.launch import activation_constants
from tritonconv.ops.core.layout import as_format
from tritonconv.ops.core.torch_norm import batch_norm_on_torch

__all__ = ["BatchNorm", "Epilogue", "ResidualError", "check_device", "check_dtype"]

TENSORS = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias", "residual")


class ResidualError(RuntimeError):
    """The residual and the result have different sizes."""


def check_dtype(op: str, x: Tensor, name: str, t: Tensor, what: object) -> None:
    """Raise torch's exception for a tensor of another dtype than the input x; `what` is printed as the geometry."""
    if t.dtype != x.dtype:
        raise RuntimeError(f"{op}: input type ({x.dtype}) and {name} type ({t.dtype}) should be the same ({what})")


def check_device(op: str, x: Tensor, name: str, t: Tensor, what: object) -> None:
    """Raise torch's exception for a tensor on another device than the input x; `what` is printed as the geometry."""
    if t.device != x.device:
        raise RuntimeError(
            f"{op}: expected all tensors to be on the same device, but got {x.device} for the input and {t.device} for "
            f"{name} ({what})"
        )


class BatchNorm(NamedTuple):
    """A batch norm in eval mode: running statistics and affine parameters, each of shape (K,)."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Epilogue(NamedTuple):
    """y = act(bn(conv + bias) + residual); every part may be missing."""

    bias: Tensor | None = None
    batch_norm: BatchNorm | None = None
    residual: Tensor | None = None
    activation: ActivationSpec | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that the kernel would read."""
        norm = self.batch_norm[:4] if self.batch_norm else ()
        return tuple(t for t in (self.bias, *norm, self.residual) if t is not None)

    def describe(self) -> str:
        """Its parts in order, such as "batch norm+residual+relu"; "" for none."""
        parts = {"bias": self.bias, "batch norm": self.batch_norm, "residual": self.residual}
        names = [name for name, part in parts.items() if part is not None]
        return "+".join(names + ([self.activation.name] if self.activation else []))

    def map(self, function: Callable[[Tensor], Tensor]) -> Epilogue:
        """The same with every tensor mapped."""

        def each(t: Tensor | None) -> Tensor | None:
            return None if t is None else function(t)

        norm = self.batch_norm
        if norm is not None:
            norm = BatchNorm(function(norm.mean), function(norm.var), each(norm.weight), each(norm.bias), norm.eps)
        return Epilogue(each(self.bias), norm, each(self.residual), self.activation)

    def arranged(self, channels_last: bool) -> Epilogue:
        """The tensors as kernels read them for a result of this format: contiguous vectors, the residual in this format."""
        residual = None if self.residual is None else as_format(self.residual, channels_last)
        return self._replace(residual=None).map(Tensor.contiguous)._replace(residual=residual)

    def arguments(self) -> dict[str, Any]:
        """The arguments of a kernel, with the same names for every kernel."""
        norm = self.batch_norm
        mean, var, gamma, beta = (None,) * 4 if norm is None else norm[:4]
        return dict(
            residual_ptr=self.residual, bias_ptr=self.bias, mean_ptr=mean, var_ptr=var, gamma_ptr=gamma, beta_ptr=beta,
            **self.constants(),
        )  # fmt: skip

    def constants(self) -> dict[str, Any]:
        """The arguments that are not tensors."""
        return dict(EPS=float(self.batch_norm.eps) if self.batch_norm else 0.0, **activation_constants(self.activation))

    def torch(self, y: Tensor) -> Tensor:
        """The epilogue by torch, after a convolution that has already added its bias."""
        if self.batch_norm is not None:
            mean, var, weight, bias, eps = self.batch_norm
            y = batch_norm_on_torch(y, mean, var, weight, bias, eps=eps)
        if self.residual is not None:
            y = y + self.residual
        return y if self.activation is None else self.activation.torch(y)

    def check(self, op: str, what: object, x: Tensor, channels: int, output_shape: tuple[int, ...] | None) -> None:
        """Raise torch's exceptions for tensors of a wrong size, type or device; `what` is printed as the geometry.

        `output_shape` is None if the caller has checked the residual.
        """
        if self.bias is not None and tuple(self.bias.shape) != (channels,):
            raise RuntimeError(
                f"{op}: expected bias to be 1-dimensional with {channels} elements, but got bias of size "
                f"{list(self.bias.shape)} instead ({what})"
            )
        if self.bias is not None:
            check_dtype(op, x, "bias", self.bias, what)
        if self.batch_norm is not None:
            *norm, eps = self.batch_norm
            if not isinstance(eps, Real):
                raise TypeError(f"{op}(): argument 'eps' must be float, not {type(eps).__name__} ({what})")
            if eps < 0:
                raise ValueError(f"{op}: batch norm's eps must be non-negative, but got {eps} ({what})")
            for name, t in zip(TENSORS[1:5], norm, strict=True):
                if t is not None and tuple(t.shape) != (channels,):
                    raise RuntimeError(
                        f"{op}: {name} should contain {channels} elements, not {t.numel()} of size {list(t.shape)} ({what})"
                    )
        if self.residual is not None and output_shape is not None and tuple(self.residual.shape) != output_shape:
            raise ResidualError(
                f"{op}: expected residual of the output's size {list(output_shape)}, but got {list(self.residual.shape)} "
                f"({what})"
            )
        for name, t in zip(TENSORS, (self.bias, *(self.batch_norm or (None,) * 4)[:4], self.residual), strict=True):
            if t is not None:
                check_device(op, x, name, t, what)
