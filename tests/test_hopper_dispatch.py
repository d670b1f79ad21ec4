"""Who is asked for Hopper's kernels, and what happens to what they do not support."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hopper import HOPPER, ON_CPU, channels_last
from torch import Tensor

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv import conv_norm, operator, route
from tritonconv.ops.conv.route import data_gradient, weight_gradient
from tritonconv.ops.core import backend
from tritonconv.ops.core.backend import asking_hopper, hopper_asked
from tritonconv.ops.core.launch import captured
from tritonconv.ops.core.signature import clear_caches
from tritonconv.tuning import device_named

pytestmark = ON_CPU


def layer(**options: Any) -> tritonconv.nn.Conv2d:
    made = tritonconv.nn.Conv2d(64, 72, 3, padding=1, dtype=torch.bfloat16, device="meta", **options)
    return made.requires_grad_(False).to(memory_format=torch.channels_last)


def image() -> Tensor:
    return torch.empty(2, 64, 9, 8, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)


def kernels(call: Callable[[], object], device: Any = HOPPER) -> list[str]:
    """The kernels that a call would launch, by their files."""
    with captured(device) as launches:
        call()
    return [launch.kernel.fn.__module__.removeprefix("tritonconv.kernels.") for launch in launches]


def test_nobody_gets_them_unasked() -> None:
    assert kernels(lambda: layer()(image())) == ["conv_fprop"]
    assert not hopper_asked()


def test_the_process_asks() -> None:
    with tritonconv.set_backend("hopper"):
        assert kernels(lambda: layer()(image())) == ["hopper.conv"]
    assert kernels(lambda: layer()(image())) == ["conv_fprop"]


def test_the_environment_asks_unless_torch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.settings, "hopper", True)
    assert kernels(lambda: layer()(image())) == ["hopper.conv"]
    with tritonconv.set_backend("triton"):
        assert kernels(lambda: layer()(image())) == ["hopper.conv"]
    with tritonconv.set_backend("torch"):
        assert not hopper_asked()


def test_a_layer_asks_for_itself_alone() -> None:
    asking, other = layer(), layer()
    asking.backend = "hopper"
    for _ in range(2):
        assert kernels(lambda: (asking(image()), other(image()))) == ["hopper.conv", "conv_fprop"]
    with tritonconv.set_backend("triton"):
        assert kernels(lambda: asking(image())) == ["conv_fprop"]


def test_converted_layers_ask() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 1))
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    converted = tritonconv.convert(model, backend="hopper")
    assert {module.backend for module in converted.modules() if isinstance(module, torch.nn.Conv2d)} == {"hopper"}


def test_another_gpu_has_the_portable_kernels() -> None:
    with tritonconv.set_backend("hopper"):
        for gpu in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200"):
            assert kernels(lambda: layer()(image()), device_named(gpu)) == ["conv_fprop"]


def test_what_they_do_not_support_runs_on_the_portable_kernels_and_explain_says_why() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.Conv2d(64, 5, 3)).to(torch.bfloat16).eval()
    x = torch.randn(1, 64, 9, 9, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def reasons() -> list[str]:
        rows = tritonconv.explain(converted, x).to_dict()["layers"]
        return [row["reason"].removesuffix(", not measured") for row in rows if row["kind"] == "Conv2d"]

    with tritonconv.set_backend("hopper"):
        converted = tritonconv.convert(model)
        assert reasons() == ["conv_flat, not hopper: the interpreter runs no Gluon"] * 2
        with captured(HOPPER) as launches:
            assert reasons() == ["hopper.conv", "conv_flat, not hopper: 64 channels and 5 filters are not multiples of 8"]
        other = device_named("A100")
        with captured(other) as more:
            assert reasons() == [f"conv_flat, not hopper: {other.name} (sm_80) is no Hopper GPU"] * 2
    assert not launches and not more


def test_cpu_tensors_have_no_hopper_backend_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    with (
        tritonconv.set_backend("hopper"),
        pytest.raises(RuntimeError, match="backend 'hopper' was asked for, but tensors on cpu"),
    ):
        TF.conv2d(torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3))


def test_gradients_go_the_same_way() -> None:
    g = ConvGeometry.parse((2, 64, 9, 8), (72, 64, 3, 3), nd=2, padding=1)
    dy = torch.empty(2, 72, 9, 8, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    w = layer().weight

    def both() -> None:
        data_gradient(dy, w, g, True, "conv")
        weight_gradient(dy, image(), g, True, True, "conv")

    portable = kernels(both)
    assert portable[:2] == ["conv_dgrad", "conv_wgrad"]
    with asking_hopper(True):
        found = kernels(both)
    # The bias gradient's sums are a kernel of their own.
    assert found[:2] == ["hopper.conv", "hopper.wgrad"] and "global_pool" in found
    # A contiguous data gradient is the portable kernel's.
    with asking_hopper(True):
        assert kernels(lambda: data_gradient(dy, w, g, False, "conv")) == ["conv_dgrad"]


def test_a_bias_gradient_sums_all_pixels() -> None:
    from tritonconv.ops.adaptive.launch import pixel_sums

    dy = channels_last(torch.randn(3, 24, 7, 5, dtype=torch.float64).bfloat16())
    torch.testing.assert_close(pixel_sums(dy).double(), dy.double().sum((0, 2, 3)), rtol=2e-2, atol=2e-2)
    dy = channels_last(torch.randn(2, 5, 3, 4, 3, dtype=torch.float64))
    torch.testing.assert_close(pixel_sums(dy), dy.sum((0, 2, 3, 4)))


def test_a_backward_pass_remembers_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def watching(name: str) -> Any:
        original = getattr(route, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            asked.append((name, hopper_asked()))
            return original(*args, **kwargs)

        return watched

    for name in ("data_gradient", "weight_gradient"):
        watched = watching(name)
        for module in (operator, conv_norm):
            monkeypatch.setattr(module, name, watched)
    for choice in ("hopper", None):
        for made in (tritonconv.nn.Conv2d(8, 8, 3), tritonconv.nn.ConvBNAct2d(8, 8, 3)):
            for module in made.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.backend = choice
            x = torch.randn(1, 8, 5, 5, requires_grad=True)
            asked.clear()
            # A gradient that was recorded before is not asked for again.
            clear_caches()
            y = made(x)
            # On a thread of its own, as autograd's are on a GPU.
            thread = threading.Thread(target=lambda y=y: y.sum().backward())
            thread.start()
            thread.join()
            assert len(asked) == 2 and all(found == (choice == "hopper") for _, found in asked), (made, asked)


def test_no_descriptor_stands_inside_a_tuple() -> None:
    # Triton before 3.8 compiles such a kernel, and cannot launch it.
    g = ConvGeometry.parse((2, 64, 9, 8), (72, 64, 3, 3), nd=2, padding=1, stride=2)
    dy = torch.empty(2, 72, 5, 4, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    with asking_hopper(True), captured(HOPPER) as launches:
        layer(stride=2)(image())
        data_gradient(dy, layer().weight, g, True, "conv")
        weight_gradient(dy, image(), g, True, False, "conv")
    for launch in launches[:3]:
        nested = [value for value in launch.arguments.values() if isinstance(value, tuple)]
        assert not any(hasattr(inner, "block_shape") for value in nested for inner in value)
        assert sum(hasattr(value, "block_shape") for value in launch.arguments.values()) == 6


def test_a_matrix_product_of_rows_is_a_convolution() -> None:
    linear = tritonconv.nn.Linear(64, 72, dtype=torch.float16, device="meta").requires_grad_(False)
    with tritonconv.set_backend("hopper"):
        assert kernels(lambda: linear(torch.empty(33, 64, dtype=torch.float16, device="meta"))) == ["hopper.conv"]
