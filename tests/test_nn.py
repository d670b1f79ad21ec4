"""Modules: torch's twins in constructor, state and behavior."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import tritonconv
from tritonconv.ops.core.launch import record_launches

SPATIAL = {1: (12,), 2: (9, 8), 3: (5, 6, 7)}


def twins(name: str, *args: object, **kwargs: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    ours, theirs = getattr(tritonconv.nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "Linear"])
def test_constructors_and_classes_are_torchs(name: str) -> None:
    ours, theirs = getattr(tritonconv.nn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    module = ours(4, 4, *(() if name == "Linear" else (3,)))
    assert list(module.state_dict()) == ["weight", "bias"] and repr(module) == repr(
        theirs(*(4, 4), *(() if name == "Linear" else (3,)))
    )


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_padding_modes(nd: int, mode: str, padding: int | str) -> None:
    ours, theirs = twins(f"Conv{nd}d", 3, 5, 3, padding=padding, padding_mode=mode)
    x = torch.randn(2, 3, *SPATIAL[nd])
    with record_launches() as launches:
        out = ours(x)
    assert launches == ["conv_flat_kernel"]
    assert torch.allclose(out, theirs(x), atol=1e-5)


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("nd", [1, 2, 3])
def test_options_reach_the_kernel(nd: int) -> None:
    ours, theirs = twins(f"Conv{nd}d", 6, 9, 2, stride=2, padding=1, dilation=2, groups=3, bias=False)
    x = torch.randn(2, 6, *SPATIAL[nd])
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours(x[0]), theirs(x[0]), atol=1e-5)


def test_bad_constructors_raise_torchs_errors() -> None:
    for arguments in (dict(groups=3), dict(padding="full"), dict(padding_mode="mirror"), dict(padding="same", stride=2)):
        with pytest.raises(ValueError) as theirs:
            torch.nn.Conv2d(4, 4, 3, **arguments)
        with pytest.raises(ValueError, match=r".") as ours:
            tritonconv.nn.Conv2d(4, 4, 3, **arguments)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_conv_bn_act_is_its_parts(nd: int, training: bool) -> None:
    block = getattr(tritonconv.nn, f"ConvBNAct{nd}d")(4, 6, 3, padding=1, activation="silu").train(training)
    block.bn.running_mean.uniform_(-1, 1)
    block.bn.running_var.uniform_(0.5, 2)
    parts = copy.deepcopy(block)
    x, residual = torch.randn(2, 4, *SPATIAL[nd]), torch.randn(2, 6, *SPATIAL[nd])
    with torch.no_grad(), record_launches() as launches:
        out = block(x, residual)
    conv = getattr(torch.nn.functional, f"conv{nd}d")(x, parts.conv.weight, padding=1)
    assert torch.allclose(out, torch.nn.functional.silu(parts.bn(conv) + residual), atol=1e-5)
    # In eval mode all of it is one launch; in training mode the statistics are ready when the convolution is.
    passes = ["batch_norm_combine_kernel", "batch_norm_normalize_kernel", "batch_norm_running_kernel"]
    assert launches == ["conv_flat_kernel", *(passes if training else [])]
    assert torch.allclose(block.bn.running_mean, parts.bn.running_mean, atol=1e-5)


def test_conv_bn_act_trains() -> None:
    block = tritonconv.nn.ConvBNReLU2d(3, 4, 3)
    with record_launches() as launches:
        block(torch.randn(2, 3, 6, 6)).sum().backward()
    assert {"batch_norm_reduce_kernel", "conv_wgrad_kernel"} <= set(launches)
    assert all(p.grad is not None for p in block.parameters()) and block.bn.num_batches_tracked == 1


def test_conv_bn_act_state_and_copies() -> None:
    block = tritonconv.nn.ConvBNAct2d(3, 4, 3, activation=torch.nn.LeakyReLU(0.2)).eval()
    assert list(block.state_dict()) == [
        "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
    ]  # fmt: skip
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(twin(x), block(x))
    assert "leaky_relu" in repr(tritonconv.nn.ConvBNAct2d(3, 4, 3, activation=("leaky_relu", 0.2)))


def test_hooks_inside_a_block_see_their_own_tensors() -> None:
    block = tritonconv.nn.ConvBNReLU2d(3, 4, 3).eval()
    seen: list[torch.Tensor] = []
    handle = block.bn.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        hooked = block(x)
        assert len(seen) == 1 and (seen[0] < 0).any()
        handle.remove()
        assert torch.allclose(block(x), hooked, atol=1e-5)
    assert len(seen) == 1
