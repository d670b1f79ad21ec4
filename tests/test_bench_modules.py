"""What the benchmarks time is what its name says: published sizes, plain tensors, trained and converted like any model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from matrix import some
from models import randomize
from torch import nn

import tritonconv
from tritonconv.bench import architectures
from tritonconv.bench.architectures import resnet
from tritonconv.bench.architectures.convnext import ConvNeXtBlock
from tritonconv.bench.architectures.layers import StochasticDepth
from tritonconv.bench.modules import MODULES, OWN, Factory, ModuleCase, calibrate_batch_norms, installed, module_cases

# Published by the libraries that have the model, DeepLab's less its auxiliary head (42,004,074 - 2,365,205). U-Net's is
# counted from the paper's figure, with three channels of the image and batch norm in the place of each bias.
PARAMETERS = {
    "resnet50": 25_557_032,
    "resnext50_32x4d": 25_028_904,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    "convnext_tiny": 28_589_128,
    "deeplabv3_resnet50": 39_638_869,
    "unet": 31_037_698,
    "r3d_18": 33_371_472,
}

OUTPUTS = {
    "conv_bn_relu": (256, 14, 14),
    "bottleneck": (1024, 14, 14),
    "inverted_residual": (32, 28, 28),
    "separable": (512, 14, 14),
    "unet_stage": (128, 256, 256),
    "deeplabv3_resnet50": (21, 513, 513),
    "unet": (2, 512, 512),
    "r3d_18": (400,),
}

# Layers that run with something fused behind them, of one call in eval mode.
FUSED = {
    "conv_bn_relu": 1,
    "bottleneck": 3,
    "inverted_residual": 3,
    "separable": 2,
    # Not the transposed convolution.
    "unet_stage": 2,
    "resnet50": 53,
    "resnext50_32x4d": 53,
    "mobilenet_v2": 52,
    # 49 of the trunk, and two in each of 16 squeeze-excite networks.
    "efficientnet_b0": 81,
    # The first linear layer of each block, with GELU.
    "convnext_tiny": 18,
    "deeplabv3_resnet50": 60,
    "unet": 18,
    "r3d_18": 20,
}

# Small enough for a CPU, and large enough that batch norm still has something to average.
TINY = {
    "unet_stage": (512, 4, 4),
    "unet": (3, 16, 16),
    "deeplabv3_resnet50": (3, 17, 17),
    "r3d_18": (3, 4, 16, 16),
}

every_case = pytest.mark.parametrize("case", MODULES.values(), ids=MODULES)
some_cases = pytest.mark.parametrize("case", some(MODULES.values(), 5), ids=lambda case: case.name)


def tiny(case: ModuleCase, batch: int) -> torch.Tensor:
    channels, *size = case.input
    return torch.randn(batch, *TINY.get(case.name, (channels, *(min(n, 32) for n in size))))


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Packages may be put into sys.modules, and are forgotten afterwards."""
    installed.cache_clear()
    yield monkeypatch
    installed.cache_clear()


@pytest.mark.parametrize("own", [True, False], ids=["own", "installed"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str, own: bool) -> None:
    with torch.device("meta"):
        model = MODULES[name].make(own=own)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("own", [True, False], ids=["own", "installed"])
@every_case
def test_outputs_are_tensors_of_the_published_size(case: ModuleCase, own: bool) -> None:
    with torch.device("meta"):
        model = case.make(own=own)
        assert model.training
        y = model.eval()(case.images(2))
    assert y.shape == (2, *OUTPUTS.get(case.name, (1000,)))


@some_cases
def test_own_definitions_train_and_infer(case: ModuleCase) -> None:
    model, x = case.make(own=True), tiny(case, 2)
    y = model(x)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        z = calibrate_batch_norms(model, x).eval()(x)
    assert z.shape == y.shape and z.isfinite().all()
    # Different images give different results: nothing has faded away on the way.
    assert (z[0] - z[1]).abs().max() > 0.01 * z.abs().max()


@some_cases
def test_converted_own_definitions_compute_the_same(case: ModuleCase) -> None:
    model, x = randomize(case.make(own=True)), tiny(case, 1)
    # Of two images, some channels would have hardly any variance to divide by.
    calibrate_batch_norms(model, tiny(case, 4))
    for module in model.modules():
        if isinstance(module, ConvNeXtBlock):
            # As they begin, such blocks add a millionth of what they compute.
            nn.init.uniform_(module.scale, 0.2, 0.5)
    # In fp64, since untrained networks multiply errors: one in the last digit of fp32 becomes 1e-4 in EfficientNet.
    model, x = model.double(), x.double()
    with tritonconv.set_backend("torch"), torch.no_grad():
        expected = model(x)
        # In place: copies of all these weights would take longer than the rest.
        actual = tritonconv.convert(model, inplace=True)(x)
        rows = tritonconv.explain(model, x).to_dict()["layers"]
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert sum(bool(row["fused"]) for row in rows) == FUSED[case.name]


def test_convert_fuses_across_the_residual_additions_of_blocks() -> None:
    model = nn.Sequential(architectures.bottleneck(), architectures.bottleneck()).eval()
    with tritonconv.set_backend("torch"):
        report = tritonconv.explain(tritonconv.convert(model), torch.randn(1, 1024, 2, 2)).to_dict()
    assert [(part["root"], part["chains"]) for part in report["fusion"]] == [("", 6)]
    # The third convolution of each block takes along the addition and the activation behind it.
    assert [len(row["fused"]) for row in report["layers"]] == [2, 2, 3] * 2


@every_case
def test_batches(case: ModuleCase) -> None:
    assert case.batches[0] == 1 < case.batches[1] and case.train_batch > 1
    x = case.images(3, device="meta", dtype=torch.bfloat16)
    assert x.shape == (3, *case.input) and x.dtype == torch.bfloat16


def test_suites() -> None:
    assert [*module_cases("blocks"), *module_cases("models")] == list(MODULES.values())
    assert {case.name for case in module_cases("models")} == set(PARAMETERS)
    with pytest.raises(ValueError, match="suite must be one of blocks, models, got 'model'"):
        module_cases("model")


def test_a_library_that_imports_supplies_the_model(libraries: pytest.MonkeyPatch) -> None:
    package = ModuleType("torchvision")
    package.__version__ = "9.9"
    package.models = SimpleNamespace(resnet50=lambda weights: nn.Identity() if weights is None else None)
    libraries.setitem(sys.modules, "torchvision", package)
    case = MODULES["resnet50"]
    assert isinstance(case.make(), nn.Identity) and case.provider() == "torchvision 9.9"
    assert case.provider(own=True) == OWN
    with torch.device("meta"):
        assert not isinstance(case.make(own=True), nn.Identity)


def test_scores_of_a_library_come_as_a_tensor(libraries: pytest.MonkeyPatch) -> None:
    class Segmentation(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": x}

    def deeplab(**options: object) -> nn.Module:
        assert options == dict(weights=None, weights_backbone=None, num_classes=21, aux_loss=False)
        return Segmentation()

    package = ModuleType("torchvision")
    package.models = SimpleNamespace(segmentation=SimpleNamespace(deeplabv3_resnet50=deeplab))
    libraries.setitem(sys.modules, "torchvision", package)
    x = torch.randn(1, 3, 2, 2)
    assert MODULES["deeplabv3_resnet50"].make()(x) is x


def test_a_library_that_does_not_import_is_passed_over(
    libraries: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "made_for_another_torch.py").write_text("raise RuntimeError('operator nms does not exist')")
    libraries.syspath_prepend(folder)
    factory = Factory(nn.Identity, (("no_such_package", nn.Module), ("made_for_another_torch", nn.Module)))
    with pytest.warns(UserWarning, match="made_for_another_torch is installed .* operator nms does not exist"):
        assert factory.provider() == OWN
    # Told once.
    assert isinstance(factory(), nn.Identity)


def test_a_case_may_be_made_of_any_function() -> None:
    case = ModuleCase("identity", "blocks", nn.Identity, (3, 2, 2), (1, 2), 2, "none")
    assert case.provider() == OWN and case.make()(case.images(2)).shape == (2, 3, 2, 2)


def test_stochastic_depth_keeps_the_mean() -> None:
    x = torch.ones(4000, 2, 1)
    y = StochasticDepth(0.25)(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # An image is dropped as a whole.
    assert torch.equal(y[:, 0], y[:, 1])
    assert abs(y.mean().item() - 1) < 0.05


def test_settling_leaves_nothing_else_behind() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(), nn.InstanceNorm2d(2).eval())
    x = torch.randn(4, 2, 3, 3)
    assert calibrate_batch_norms(model, x) is model
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert model[0].momentum == 0.1
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, x.var((0, 2, 3)))


def test_output_stride_is_checked() -> None:
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        resnet.trunk(output_stride=4)
