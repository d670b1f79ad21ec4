"""Two spellings of one computation agree: each catches what a shared reference could miss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tritonconv.functional as TF

pytestmark = pytest.mark.usefixtures("on_triton")


def randn(*shape: int, device: str) -> Tensor:
    t = torch.randn(shape, device=device)
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), (a - b).abs().max()


@pytest.mark.parametrize("channels", [4, 24, 128], ids=["flat", "flat vectors", "fprop"])
def test_grouped_is_the_concatenation_of_dense(channels: int, device: str) -> None:
    x, w = randn(2, 2 * channels, 7, 6, device=device), randn(10, channels, 3, 3, device=device)
    parts = [TF.conv2d(x[:, g * channels : (g + 1) * channels], w[g * 5 : g * 5 + 5], padding=1) for g in range(2)]
    close(TF.conv2d(x, w, padding=1, groups=2), torch.cat(parts, 1))


@pytest.mark.parametrize("channels", [3, 128])
def test_dilated_is_dense_with_a_zero_stuffed_filter(channels: int, device: str) -> None:
    x, w = randn(1, channels, 11, 9, device=device), randn(8, channels, 3, 2, device=device)
    stuffed = torch.zeros(8, channels, 7, 3, device=device)
    stuffed[:, :, ::3, ::2] = w
    close(TF.conv2d(x, w, dilation=(3, 2), padding=2), TF.conv2d(x, stuffed, padding=2))


@pytest.mark.parametrize("channels", [3, 128])
def test_strided_is_every_second_pixel(channels: int, device: str) -> None:
    x, w = randn(1, channels, 9, 8, device=device), randn(8, channels, 3, 3, device=device)
    close(TF.conv2d(x, w, stride=2, padding=1), TF.conv2d(x, w, padding=1)[:, :, ::2, ::2])


@pytest.mark.parametrize("channels", [3, 128])
def test_padding_is_zeros_around_the_image(channels: int, device: str) -> None:
    x, w = randn(1, channels, 5, 6, device=device), randn(8, channels, 3, 3, device=device)
    close(TF.conv2d(x, w, padding=(2, 1)), TF.conv2d(torch.nn.functional.pad(x, (1, 1, 2, 2)), w))


@pytest.mark.parametrize("channels", [3, 128])
def test_1d_is_2d_of_height_one_is_3d_of_depth_one(channels: int, device: str) -> None:
    x, w = torch.randn(2, channels, 12, device=device), torch.randn(8, channels, 3, device=device)
    one = TF.conv1d(x, w, stride=2, padding=1)
    two = TF.conv2d(x[:, :, None], w[:, :, None], stride=(1, 2), padding=(0, 1))
    three = TF.conv3d(x[:, :, None, None], w[:, :, None, None], stride=(1, 1, 2), padding=(0, 0, 1))
    close(one, two.squeeze(2))
    close(one, three.squeeze(3).squeeze(2))


def test_1x1_is_linear_over_pixels(device: str) -> None:
    x, w, b = randn(2, 24, 5, 4, device=device), torch.randn(10, 24, device=device), torch.randn(10, device=device)
    close(TF.conv2d(x, w[:, :, None, None], b), TF.linear(x.permute(0, 2, 3, 1), w, b).permute(0, 3, 1, 2))


def test_patches_are_linear_over_unfolded_images(device: str) -> None:
    x, w = randn(2, 3, 8, 12, device=device), randn(10, 3, 4, 4, device=device)
    rows = torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
    close(TF.conv2d(x, w, stride=4).flatten(2).transpose(1, 2), TF.linear(rows, w.reshape(10, -1)))


def test_fused_is_unfused(device: str) -> None:
    x, w, b = randn(2, 32, 5, 4, device=device), randn(16, 32, 3, 3, device=device), torch.randn(16, device=device)
    mean, var, gamma, beta = torch.rand(4, 16, device=device).unbind()
    residual = randn(2, 16, 5, 4, device=device)
    fused = TF.conv2d_bn_act(x, w, b, mean, var, gamma, beta, padding=1, residual=residual, activation="relu")
    y = torch.nn.functional.batch_norm(TF.conv2d(x, w, b, padding=1), mean, var, gamma, beta)
    close(fused, torch.relu(y + residual))


def test_sum_over_channel_halves(device: str) -> None:
    x, w = randn(1, 64, 5, 4, device=device), randn(16, 64, 3, 3, device=device)
    halves = [TF.conv2d(x[:, h], w[:, h], padding=1) for h in (slice(0, 32), slice(32, 64))]
    close(TF.conv2d(x, w, padding=1), halves[0] + halves[1])
