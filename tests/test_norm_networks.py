"""Networks with group, instance and layer norms train whole on our kernels: a VAE's decoder, a ConvNeXt and an nnU-Net."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tritonconv


class Stage(nn.Sequential):
    """Two convolutions with instance norm and LeakyReLU, as nnU-Net has them (F. Isensee et al., 2021)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        layers: list[nn.Module] = []
        for i, step in ((inputs, stride), (outputs, 1)):
            layers += [nn.Conv2d(i, outputs, 3, step, 1), nn.InstanceNorm2d(outputs, affine=True), nn.LeakyReLU(0.01)]
        super().__init__(*layers)


class NNUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = Stage(3, 4), Stage(4, 8, 2)
        self.up, self.last, self.head = nn.ConvTranspose2d(8, 4, 2, 2), Stage(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        return self.head(self.last(torch.cat([self.up(self.down(skip)), skip], 1)))


def decoder() -> nn.Module:
    """Stable Diffusion's decoder of images, narrow, from diffusers."""
    from diffusers.models.autoencoders.vae import Decoder

    return Decoder(
        in_channels=4, out_channels=3, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip


def convnext() -> nn.Module:
    """Z. Liu et al., 2022, narrow, from timm; scales of layers are not near zero, so that gradients show."""
    import timm

    return timm.create_model(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), num_classes=5, ls_init_value=0.5, conv_mlp=False
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "decoder": (decoder, (2, 4, 6, 6)),
    "convnext": (convnext, (2, 3, 32, 32)),
    "nnunet": (NNUNet, (2, 3, 8, 8)),
}
# Torch's operators that must not run forward; the GELU between two linear layers of ConvNeXt may, in training.
NORMS = {"aten::native_group_norm", "aten::native_layer_norm", "aten::native_batch_norm", "aten::instance_norm"}
ACTIVATIONS = {"aten::silu", "aten::leaky_relu", "aten::leaky_relu_", "aten::gelu"}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_torchs_and_no_norm_is_left_to_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    importlib.import_module("zoo_models").declare_operators()
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    converted = tritonconv.convert(copy.deepcopy(model))
    for training in (False, True):
        rows = tritonconv.explain(converted.train(training), x).layers
        assert all(row.backend == "triton" for row in rows), rows
    found = []
    with tritonconv.set_backend("triton"):
        for net in (model, converted):
            leaf = x.clone().requires_grad_()
            # Tracing calls torch's operators, too.
            net(leaf)
            with torch.autograd.profiler.profile() as profile:
                y = net(leaf)
            y.square().mean().backward()
            found.append((y, leaf.grad, *(p.grad for p in net.parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    by_torch = {event.name for event in profile.function_events} & (NORMS | ACTIVATIONS)
    assert by_torch <= ({"aten::gelu"} if name == "convnext" else set())
