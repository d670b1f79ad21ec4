"""Receptive fields of a running model, and the products that it computes, seen as torch functions are called."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from tritonconv.geometry import ConvGeometry

__all__ = ["Field", "FunctionWatcher", "Product", "tensors_in"]

WINDOWS = re.compile(
    r"(conv|conv_transpose|max_pool|avg_pool|lp_pool|adaptive_avg_pool|adaptive_max_pool)([123])d(_with_indices)?"
)
ARGUMENTS = {
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "linear": ("input", "weight", "bias"),
    "max_pool": ("input", "kernel_size", "stride", "padding", "dilation"),
    "avg_pool": ("input", "kernel_size", "stride"),
    "lp_pool": ("input", "norm_type", "kernel_size", "stride"),
    "adaptive_avg_pool": ("input", "output_size"),
    "adaptive_max_pool": ("input", "output_size"),
}


@dataclass(frozen=True)
class Field:
    """What an element of a tensor depends on, per axis of the model's image."""

    image: tuple[int, ...]
    """Pixels of the image."""
    extent: tuple[float, ...]
    """Pixels that an element sees, padding included."""
    jump: tuple[float, ...]
    """Pixels between neighboring elements."""

    @property
    def size(self) -> int | list[int]:
        """Extent in whole pixels; one number where all axes agree."""
        sizes = [math.ceil(extent - 1e-9) for extent in self.extent] or [1]
        return sizes[0] if len(set(sizes)) == 1 else sizes

    def over(self, window: Iterable[float], stride: Iterable[float]) -> Field:
        """The field after a window of so many elements, moved by so many."""
        extent = tuple(e + (w - 1) * j for e, w, j in zip(self.extent, window, self.jump, strict=True))
        return Field(self.image, extent, tuple(j * s for j, s in zip(self.jump, stride, strict=True)))

    def whole(self) -> Field:
        """The field of something that depends on every element."""
        return Field(self.image, tuple(max(e, n) for e, n in zip(self.extent, self.image, strict=True)), self.jump)


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer that torch computes."""

    op: str
    macs: int
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [t for v in value for t in tensors_in(v)]


class FunctionWatcher(TorchFunctionMode):
    """Follows tensors through every torch function called in the block.

    Windows (convolutions, pools) widen the field, means and flattened images see everything, all else takes the widest of
    its inputs.
    """

    def __init__(self, inputs: Any, on_product: Callable[[Product, Field | None], None]) -> None:
        super().__init__()
        self._fields: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._on_product = on_product
        for x in tensors_in(inputs):
            image = tuple(x.shape[2:])
            self._fields[x] = Field(image, (1,) * len(image), (1,) * len(image))

    def field(self, x: Tensor) -> Field | None:
        """The field of a tensor's elements, None where it does not depend on the model's input."""
        return self._fields.get(x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        inputs = tensors_in((args, kwargs))
        # An operation in place changes its input's shape, never its field's origin.
        field, shape = self._widest(inputs), tuple(inputs[0].shape) if inputs else ()
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        if not outputs:
            return result
        window = WINDOWS.fullmatch(name)
        kind = window[1] if window else name
        given = dict(zip(ARGUMENTS.get(kind, ()), args, strict=False)) | kwargs
        if field is not None:
            field = _through(kind, int(window[2]) if window else 0, given, field, shape, outputs[0])
            for output in outputs:
                self._fields[output] = field
        if kind in ("conv", "conv_transpose", "linear"):
            self._on_product(_product(name, kind, given, outputs[0]), field)
        return result

    def _widest(self, inputs: list[Tensor]) -> Field | None:
        fields = [f for f in map(self.field, inputs) if f is not None]
        if not fields:
            return None
        axes = max(len(f.image) for f in fields)
        fields = [f for f in fields if len(f.image) == axes]
        if len(fields) == 1:
            return fields[0]

        def widest(values: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
            return tuple(map(max, zip(*values, strict=True)))

        return Field(widest(f.image for f in fields), widest(f.extent for f in fields), widest(f.jump for f in fields))


def _axes(value: Any, nd: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * nd if len(values) == 1 else values


def _through(kind: str, nd: int, given: dict[str, Any], field: Field, shape: tuple[int, ...], output: Tensor) -> Field:
    """The field after a function of this kind; `shape` is its input's."""
    if nd and len(field.image) != nd:
        # An unbatched image, or another form of the data: what comes now is the image.
        field = Field(shape[-nd:], (1,) * nd, (1,) * nd)
    if kind in ("conv", "conv_transpose"):
        stride, dilation = _axes(given.get("stride", 1), nd), _axes(given.get("dilation", 1), nd)
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, given["weight"].shape[2:], strict=True)]
        if kind == "conv":
            return field.over(reach, stride)
        return field.over([math.ceil(r / s) for r, s in zip(reach, stride, strict=True)], [1 / s for s in stride])
    if kind.startswith("adaptive"):
        sizes, out = shape[-nd:], tuple(output.shape[-nd:])
        if all(n == 1 for n in out):
            return field.whole()
        return field.over([math.ceil(n / o) for n, o in zip(sizes, out, strict=True)],
                          [n / o for n, o in zip(sizes, out, strict=True)])  # fmt: skip
    if nd:
        kernel = _axes(given["kernel_size"], nd)
        stride = _axes(given.get("stride") or kernel, nd)
        dilation = _axes(given.get("dilation", 1), nd)
        return field.over([d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)], stride)
    axes = len(field.image)
    if kind == "interpolate" and len(shape) == axes + 2:
        taps = 1 if str(given.get("mode", "nearest")).startswith("nearest") else 2
        return field.over([taps] * axes, [n / o for n, o in zip(shape[2:], output.shape[2:], strict=True)])
    gone = output.dim() < len(shape) or (kind == "mean" and math.prod(output.shape[2:]) == 1)
    return field.whole() if axes and gone and len(shape) == axes + 2 and math.prod(shape[2:]) > 1 else field


def _product(name: str, kind: str, given: dict[str, Any], output: Tensor) -> Product:
    x, weight = given["input"], given["weight"]
    if kind == "linear":
        macs = output.numel() * weight.shape[-1]
    else:
        extra = {key: given[key] for key in ("stride", "padding", "dilation", "groups", "output_padding") if key in given}
        transposed = kind == "conv_transpose"
        nd = weight.dim() - 2
        macs = ConvGeometry.parse(x.shape, weight.shape, nd=nd, transposed=transposed, **extra).macs
    return Product(name, macs, x, weight, given.get("bias"), output)
