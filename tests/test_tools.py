"""What tools do to a model after convert: adapters, folded batch norms, averages, and all that reads its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import rotate
from models import randomize
from test_convert import run
from test_convert_training import assert_steps
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

import tritonconv


class Block(nn.Module):
    """A convolution with its batch norm and activation, which `fuse` folds, as in ultralytics' models."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(outputs), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Branches(nn.Module):
    """Two convolutions with batch norms, and one in their place after `fuse`, as in RepVGG."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "whole"):
            return self.act(self.whole(x))
        return self.act(self.dense(x) + self.point(x))


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale


def plain(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
    conv.weight.data, conv.bias.data = weight.detach(), bias.detach()
    return conv.train(False)


def fold_batch_norms(model: nn.Module) -> None:
    """YOLO's: the block loses its batch norm, and gets another forward."""
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        block.conv = plain(*folded(block.conv, block.bn))
        del block.bn
        block.forward = block.forward_fuse  # type: ignore[method-assign]


def join_branches(model: nn.Module) -> None:
    """RepVGG's: the block loses its branches."""
    for block in [m for m in model.modules() if isinstance(m, Branches)]:
        (dense, a), (point, b) = folded(*block.dense), folded(*block.point)
        block.whole = plain(dense + nn.functional.pad(point, [1, 1, 1, 1]), a + b)
        del block.dense, block.point


class Adapter(nn.Module):
    """PEFT's for convolutions: the layer that was there, and two small ones beside it."""

    def __init__(self, base: nn.Conv2d, rank: int = 2, alpha: float = 3.0) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(
            base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)})  # fmt: skip
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(rank, base.out_channels, 1, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.scaling = {"default": alpha / rank}
        self.active, self.merged = ["default"], False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        kind = result.dtype
        for name in self.active:
            x = x.to(self.lora_A[name].weight.dtype)
            result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return result.to(kind)

    def merge(self) -> None:
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        product = torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
        self.base_layer.weight.data += product * self.scaling["default"]
        self.merged = True


def add_adapters(model: nn.Module) -> None:
    torch.manual_seed(3)
    model.requires_grad_(False)
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        block.conv = Adapter(block.conv).train(block.training)


def merge_adapters(model: nn.Module) -> None:
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        block.conv.merge()


def make() -> nn.Module:
    return randomize(nn.Sequential(Block(3, 8, 3), Branches(8), Block(8, 4, 1)))


# What is done, one after another, and what a call launches after each.
TOOLS: dict[str, list[tuple[Callable[[nn.Module], None], int]]] = {
    "batch norms are folded": [(fold_batch_norms, 4)],
    "branches are joined": [(join_branches, 3)],
    "all is folded": [(fold_batch_norms, 4), (join_branches, 3)],
    "adapters are added, and merged": [(add_adapters, 10), (merge_adapters, 4)],
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_model_may_be_rewritten_between_two_calls(name: str) -> None:
    original = make()
    converted, x = tritonconv.convert(original), torch.randn(2, 3, 6, 6)
    assert run(converted, x)[1] == 4
    for change, launches in TOOLS[name]:
        for model in (original, converted):
            change(model)
        y, found = run(converted, x)
        torch.testing.assert_close(y, run(original, x)[0], rtol=1e-4, atol=1e-5)
        assert found == launches


@rotate(before=[False, True])
def test_adapters_train(before: bool) -> None:
    original, x = make().train(), torch.randn(2, 3, 6, 6)
    if before:
        add_adapters(original)
    converted = tritonconv.convert(original)
    assert_steps(original, converted, x)
    if not before:
        for model in (original, converted):
            add_adapters(model)
    assert_steps(original, converted, x)


def test_beside_adapters_activations_stay_channels_last() -> None:
    model, x = make(), torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    converted = tritonconv.convert(model)
    for each in (model, converted):
        add_adapters(each)
    # Weights of layers that came later are contiguous: copied, unless the model is converted again.
    rows = tritonconv.explain(converted, x).layers
    assert {row.name for row in rows if row.copies} == {"0.conv.lora_A.default"}
    assert tritonconv.explain(tritonconv.convert(converted, inplace=True), x).totals["copies"] == 0


def test_a_moving_average_of_a_model_is_a_model_of_its_own() -> None:
    original, x = make(), torch.randn(2, 3, 6, 6)
    converted = tritonconv.convert(original)
    results = []
    for model in (original, converted):
        run(model, x)
        average = copy.deepcopy(model)
        with torch.no_grad():
            for slow, fast in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                if slow.is_floating_point():
                    slow.lerp_(fast + 1, 0.1)
        results.append((run(average, x), run(model, x)))
    for (theirs, _), (ours, launches) in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert launches == 4


def to_vector(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach()


def from_vector(model: nn.Module) -> Tensor:
    vector_to_parameters(to_vector(model) * 2, model.parameters())
    return to_vector(model)


def prune_filters(model: nn.Module) -> Tensor:
    prune.l1_unstructured(model[0].conv, "weight", 0.5)
    prune.remove(model[0].conv, "weight")
    return model[0].conv.weight.detach()


def search_lines(model: nn.Module) -> Tensor:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1, lr=1e-3)
    x = torch.ones(1, 3, 4, 4)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model(x).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return to_vector(model)


@pytest.mark.parametrize("tool", [to_vector, from_vector, prune_filters, search_lines])
def test_tools_that_view_weights_take_contiguous_ones(tool: Callable[[nn.Module], Tensor]) -> None:
    model = make()
    converted = tritonconv.convert(model, memory_format=torch.contiguous_format)
    torch.testing.assert_close(tool(converted), tool(copy.deepcopy(model)), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="view size"):
        tool(model.to(memory_format=torch.channels_last))


def test_state_for_files_of_contiguous_tensors() -> None:
    """safetensors takes no others."""
    model = make()
    kept = tritonconv.convert(model, memory_format=torch.contiguous_format).state_dict()
    assert all(t.is_contiguous() for t in kept.values())
    converted = tritonconv.convert(model)
    written = {name: t.clone(memory_format=torch.contiguous_format) for name, t in converted.state_dict().items()}
    converted.load_state_dict({name: torch.zeros_like(t) for name, t in written.items()})
    converted.load_state_dict(written)
    for name, t in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], t)
    assert converted[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
