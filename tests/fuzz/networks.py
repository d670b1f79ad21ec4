"""Random small networks, converted: in eval mode, one training step, and put back."""

from __future__ import annotations

import copy
import traceback
import warnings
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tritonconv

from .builder import Builder
from .call import WrongError, significant
from .steps import STEPS

__all__ = ["run"]

Module = torch.nn.Module
# Of a value against the whole tensor's size, beside what torch's own layers are off in the same type.
LEAST = {torch.float32: 1e-4, torch.float64: 1e-7}
ROUNDING = 30


def run(seed: int, i: int) -> dict[str, Any]:
    """What came of network i: a line of the log."""
    r = Random(f"{seed}/{i}")
    nd = r.choice((1, 2, 2, 2, 3))
    shape = (r.choice((2, 3)), r.choice((2, 3, 4, 6)), *(r.randint(3, {1: 16, 2: 9, 3: 5}[nd]) for _ in range(nd)))
    b = Builder(r, shape)
    steps = r.randint(3, 9)
    for _ in range(steps * 3):
        if len(b.lines) < steps:
            v = b.pick()
            kinds, weights = zip(*STEPS[3 <= b.values[v].dim() <= 5], strict=True)
            r.choices(kinds, weights)[0](b, v)
    kind, source = b.build(f"{seed}/{i}")
    dtype = r.choice((torch.float32, torch.float32, torch.float32, torch.float64))
    last = nd > 1 and r.random() < 0.2
    record = dict(
        operator=f"{nd}-d", dtype=str(dtype)[6:], layout="channels_last" if last else "contiguous", backend="auto"
    )
    torch.manual_seed(r.getrandbits(32))
    try:
        # Of one and three dimensions torch keeps channels-last results on some devices, and in some functions, alone.
        _check(kind, torch.randn(shape).double(), dtype, last, not last or (nd == 2 and "1d" not in source))
    except WrongError as wrong:
        return record | dict(result="wrong", why=f"{wrong}; {shape}\n{source}")
    except Exception:
        return record | dict(result="crash", why=f"{traceback.format_exc(limit=-6)}; {shape}\n{source}")
    return record | dict(result="right", why="")


def _check(kind: type[Module], x: Tensor, dtype: torch.dtype, channels_last: bool, strides_too: bool) -> None:
    model = kind().to(dtype)
    _fill(model)
    image = x.to(dtype)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    strides = ""
    for training in (False, True) if _has_gradients(copy.deepcopy(model).double().eval(), x) else (False,):
        _set(model, training)
        wide = copy.deepcopy(model).double()
        expected, theirs = _step(wide, x, training), _step(copy.deepcopy(model), image, training)
        if isinstance(theirs, Exception):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = tritonconv.convert(model)
            _set(converted, training)
            ours = _step(converted, image, training)
        what = "training" if training else "eval"
        if isinstance(ours, Exception):
            raise WrongError(f"{what}: ours raises {type(ours).__name__}: {ours}") from ours
        assert not isinstance(expected, Exception)
        _compare(what, ours, theirs, expected, dtype)
        strides = strides or (_strides(what, ours, theirs) if strides_too else "")
    _check_revert(model, image, dtype)
    # Last, for they hide nothing then.
    if strides:
        raise WrongError(strides)


class _Maxima(TorchFunctionMode):
    """Whether a maximum was taken of no pixel."""

    of_nothing = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "max_pool" in getattr(function, "__name__", ""):
            values = result if isinstance(result, Tensor) else result[0]
            self.of_nothing |= bool(values.isinf().any())
        return result


def _has_gradients(model: Module, x: Tensor) -> bool:
    """Torch's gradient of a window that lies in the padding alone writes outside of the image."""
    with _Maxima() as maxima:
        _step(model, x, False)
    return not maxima.of_nothing


def _check_revert(model: Module, image: Tensor, dtype: torch.dtype) -> None:
    _set(model, False)
    back = tritonconv.revert(tritonconv.convert(model))
    if [type(m) for m in back.modules()] != [type(m) for m in model.modules()]:
        raise WrongError(f"revert gives {back}")
    reverted, plain = _step(back, image, False), _step(model, image, False)
    if not isinstance(plain, Exception):
        _compare("reverted", reverted, plain, plain, dtype)
        complaint = _strides("reverted", reverted, plain)
        if complaint:
            raise WrongError(complaint)


def _fill(model: Module) -> None:
    """Statistics and affine parameters of batch norms that do something."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for t, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 1.5),
                                 (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):  # fmt: skip
                torch.nn.init.uniform_(t, low, high)


def _set(model: Module, training: bool) -> None:
    """Training for all but dropout, whose choice would be another one for each."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()


def _step(model: Module, x: Tensor, training: bool) -> dict[str, Tensor] | Exception:
    """Everything that one call gives, by name."""
    # In-place steps of the network may write to its input.
    leaf = x.clone()
    try:
        if not training:
            with torch.no_grad():
                return _named(model(leaf))
        leaf.requires_grad_()
        # A leaf must not be written, what follows from it may.
        outputs = _named(model(leaf * 1))
        loss = torch.stack([(y.double() - 0.5).square().mean() for y in outputs.values()]).sum()
        loss.backward()
    except Exception as error:
        return error
    found = {name: y.detach() for name, y in outputs.items()} | {"gradient of x": leaf.grad}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    found |= {f"{n} afterwards": t.detach().clone() for n, t in model.named_buffers()}
    return {name: t for name, t in found.items() if t is not None}


def _named(result: Any) -> dict[str, Tensor]:
    return {f"result {k}": y for k, y in enumerate(result if isinstance(result, tuple) else (result,))}


def _compare(what: str, ours: Any, theirs: Any, expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Ours against fp64, in units of what torch's layers are off, and of the largest gradient for gradients."""
    if ours.keys() != theirs.keys():
        raise WrongError(f"{what}: {sorted(ours)}, expected {sorted(theirs)}")
    gradients = [t.abs().max() for name, t in expected.items() if name.startswith("gradient")]
    scale = max((g for g in gradients if torch.isfinite(g)), default=torch.zeros(()))
    for name, out in ours.items():
        ref, peer = expected[name].double(), theirs[name].double()
        if out.shape != ref.shape:
            raise WrongError(f"{what}, {name}: size {list(out.shape)}, expected {list(ref.shape)}")
        if not torch.equal(out.isfinite(), peer.isfinite()):
            raise WrongError(f"{what}, {name}: differs in being finite")
        finite = ref.isfinite() & peer.isfinite()
        if not finite.any():
            continue
        out, ref, peer = out.double()[finite], ref[finite], peer[finite]
        size = ref.square().mean().sqrt() + (scale if name.startswith("gradient") else 0)
        bound = LEAST[dtype] * size + ROUNDING * (peer - ref).abs().max()
        off = (out - ref).abs().max()
        if not off <= bound:
            raise WrongError(f"{what}, {name}: off by {off:.2e} of {size:.2e}, bound {bound:.2e}")


def _strides(what: str, ours: Any, theirs: Any) -> str:
    """What is wrong with a result's strides."""
    for name in (name for name in ours if name.startswith("result")):
        if significant(ours[name]) != significant(theirs[name]):
            return f"{what}, {name}: strides {ours[name].stride()}, expected {theirs[name].stride()}"
    return ""
