"""What convert keeps: parameters, state_dict, hooks, sharing, modes, copies, compilers; and that revert undoes it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from matrix import named
from models import CASES, BasicBlock, Case, Functional, Grouped, LeNet, ResNet, Shared, Untraceable, build, randomize
from torch import Tensor, nn

import tritonconv
from tritonconv.ops.core.launch import record_launches
from tritonconv.ops.core.layout import is_dense, suggests_channels_last

RESNET = named(CASES, "resnet")


def run(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, int]:
    """The model's output without gradients, and how many kernels it launched."""
    with torch.no_grad(), record_launches() as log:
        y = model(*inputs)
    return y, len(log)


def assert_as_good(actual: Tensor, original: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within twice torch's own error at that dtype, plus a few roundings, of the original in fp64."""
    with torch.no_grad():
        truth = copy.deepcopy(original).double()(x.to(dtype).double())
        torchs = (copy.deepcopy(original).to(dtype)(x.to(dtype)).double() - truth).abs().max().item()
    error = (actual.double() - truth).abs()
    # What rounding once per layer may make of a value of ordinary size.
    bound = 2 * torchs + 16 * torch.finfo(dtype).eps * truth.abs().max().item()
    assert actual.dtype == dtype
    assert error.max().item() <= bound, (
        f"error {error.max():.2e} at {divmod(int(error.argmax()), truth.shape[-1])}, bound {bound:.2e}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_are_those_of_the_original(case: Case, dtype: torch.dtype) -> None:
    original, x = build(case)
    converted = tritonconv.convert(original).to(dtype)
    y, launches = run(converted, x.to(dtype))
    assert_as_good(y, original, x, dtype)
    assert launches == case.launches


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_fusing_every_layer_launches_alone(case: Case) -> None:
    original, x = build(case)
    converted = tritonconv.convert(original, fuse=False)
    y, launches = run(converted, x)
    assert_as_good(y, original, x)
    rows = tritonconv.explain(original, x.clone()).to_dict()["layers"]
    norms = sum(row["kind"].startswith("BatchNorm") for row in rows)
    # Functions are replaced in graphs alone.
    assert launches == case.launches + norms - {"functional": 1, "lenet": 2}.get(case.name, 0)
    assert not any("forward" in m.__dict__ for m in converted.modules())


def test_the_original_is_untouched() -> None:
    original, x = build(RESNET)
    before = {name: (p, p.clone(), p.stride()) for name, p in original.named_parameters()}
    attributes = [dict(m.__dict__) for m in original.modules()]
    expected, _ = run(original, x)
    converted = tritonconv.convert(original)
    assert converted is not original
    run(converted, x)
    for name, p in original.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1]) and p.stride() == before[name][2]
    assert [dict(m.__dict__) for m in original.modules()] == attributes
    assert type(original.conv1) is nn.Conv2d
    actual, launches = run(original, x)
    assert torch.equal(actual, expected) and launches == 0


def test_in_place_keeps_the_parameter_objects_and_an_optimizer_trains_them() -> None:
    model, x = build(RESNET)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9) for m in (model, twin)]
    parameters = list(model.parameters())
    assert tritonconv.convert(model, inplace=True) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for _ in range(2):
        for m, optimizer in zip((model.train(), twin.train()), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    y, launches = run(model.eval(), x)
    assert_as_good(y, twin.eval(), x)
    assert launches == RESNET.launches


def test_state_dict_has_the_same_keys_and_values_and_loads_both_ways() -> None:
    original, x = build(RESNET)
    converted = tritonconv.convert(original)
    state = converted.state_dict()
    assert list(state) == list(original.state_dict())
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())
    other, _ = build(RESNET, seed=1)
    converted.load_state_dict(other.state_dict())
    assert_as_good(run(converted, x)[0], other, x)
    original.load_state_dict(converted.state_dict())
    assert torch.equal(run(original, x)[0], run(other, x)[0])


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["C", "CL"])
def test_weights_are_channels_last_and_hooks_see_torchs_formats(format: torch.memory_format) -> None:
    original, x = build(RESNET)
    converted = tritonconv.convert(original)
    weights = [m.weight for m in converted.modules() if isinstance(m, nn.Conv2d)]
    assert all(is_dense(w, True) for w in weights)
    seen: list[Tensor] = []
    converted.layer2.register_forward_hook(lambda *call: seen.extend([*call[1], call[2]]))
    run(converted, x.contiguous(memory_format=format))
    assert len(seen) == 2 and all(suggests_channels_last(t) == (format == torch.channels_last) for t in seen)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_training_flag_is_kept(training: bool) -> None:
    model = ResNet().train(training)
    model.layer1.train(not training)
    flags = [m.training for m in model.modules()]
    assert [m.training for m in tritonconv.convert(model).modules()] == flags


def test_shared_modules_and_tied_weights_stay_shared() -> None:
    original, x = build(named(CASES, "shared"))
    converted = tritonconv.convert(original)
    assert converted.again is converted.block and converted.tied.weight is converted.conv.weight
    assert len(list(converted.parameters())) == len(list(original.parameters()))
    with torch.no_grad():
        converted.conv.weight.mul_(2)
        original.conv.weight.mul_(2)
    assert_as_good(run(converted, x)[0], original, x)
    tritonconv.revert(converted)
    assert converted.tied.weight is converted.conv.weight and converted.conv.weight.is_contiguous()


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_subclass_with_its_own_forward_keeps_its_class_and_runs_on_our_kernels() -> None:
    model = nn.Sequential(Doubled(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()).eval()
    converted = tritonconv.convert(model)
    assert type(converted[0]) is Doubled
    x = torch.randn(2, 3, 6, 6)
    y, launches = run(converted, x)
    assert_as_good(y, model, x)
    assert launches == 2
    rows = tritonconv.explain(converted, x).to_dict()["layers"]
    assert rows[0]["kind"] == "Doubled" and rows[0]["backend"] == "triton"


def test_lazy_parametrized_and_attention_layers_keep_working() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyConv2d(8, 1)
            self.param = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.param(self.lazy(x))).flatten(2).transpose(1, 2)
            return self.attention(x, x, x)[0]

    converted = tritonconv.convert(Mixed().eval())
    assert type(converted.lazy) is nn.LazyConv2d
    x = torch.randn(2, 3, 4, 4)
    y, _ = run(converted, x)
    assert_as_good(y, tritonconv.revert(copy.deepcopy(converted)), x)
    converted.train()(x).sum().backward()
    assert converted.param.parametrizations.weight.original0.grad is not None


def test_an_eval_model_put_back_to_training_trains_as_the_original() -> None:
    original, x = build(RESNET)
    converted = tritonconv.convert(original)
    outputs = [m.train()(x) for m in (converted, original)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for (name, p), q in zip(converted.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
    for (name, a), b in zip(converted.named_buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    y, launches = run(converted.eval(), x)
    assert_as_good(y, original.eval(), x)
    assert launches == RESNET.launches


@pytest.mark.parametrize("frozen", ["bn1", "layer1"])
def test_modes_may_be_mixed(frozen: str) -> None:
    # A frozen batch norm in a training model, and one that trains in a model that does not.
    for training in (True, False):
        original, x = build(RESNET)
        converted = tritonconv.convert(original)
        for m in (original, converted):
            m.train(training).get_submodule(frozen).train(not training)
        torch.testing.assert_close(run(converted, x)[0], run(original, x)[0], rtol=1e-4, atol=1e-5)
        for a, b in zip(converted.buffers(), original.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_batch_norms_without_statistics_use_the_batchs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    assert_as_good(run(tritonconv.convert(model), x)[0], model, x)


@pytest.mark.parametrize("build_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_and_stand_for_themselves(build_copy) -> None:
    original, x = build(RESNET)
    converted = tritonconv.convert(original)
    twin = build_copy(converted)
    expected, _ = run(converted, x)
    with torch.no_grad():
        for p in converted.parameters():
            p.zero_()
    y, launches = run(twin, x)
    torch.testing.assert_close(y, expected)
    assert launches == RESNET.launches
    twin.layer1[0].bn1.train()
    assert not torch.equal(run(twin, x)[0], expected)


def replicate(model: nn.Module) -> nn.Module:
    """What nn.parallel.replicate does, onto the same device and with doubled parameters."""
    replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, replica in replicas.items():
        replica._modules = {name: replicas[child] if child else None for name, child in module._modules.items()}
        replica._buffers = dict(module._buffers)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else 2 * parameter.detach())
    return replicas[model]


def test_replicas_of_data_parallel_use_their_own_parameters() -> None:
    original, x = build(RESNET)
    replica = replicate(tritonconv.convert(original))
    with torch.no_grad():
        for p in original.parameters():
            p.mul_(2)
    assert_as_good(run(replica, x)[0], original, x)


def test_a_shallow_copy_has_attributes_of_its_own() -> None:
    converted = tritonconv.convert(Optional().eval())
    x = torch.randn(2, 3, 4, 4)
    y, _ = run(converted, x)
    twin = copy.copy(converted)
    twin.scale = 3.0
    torch.testing.assert_close(run(twin, x)[0], 3 * y)
    torch.testing.assert_close(run(converted, x)[0], y)


def test_torch_save_and_load() -> None:
    original, x = build(named(CASES, "untraceable"))
    file = io.BytesIO()
    torch.save(tritonconv.convert(original), file)
    file.seek(0)
    y, launches = run(torch.load(file, weights_only=False), x)
    assert_as_good(y, original, x)
    assert launches == named(CASES, "untraceable").launches


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_revert_gives_the_original_back(case: Case) -> None:
    original, x = build(case)
    model = copy.deepcopy(original)
    parameters = list(model.parameters())
    assert tritonconv.revert(tritonconv.convert(model, inplace=True, backend="triton")) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for (name, a), b in zip(model.named_modules(), original.modules(), strict=True):
        assert type(a) is type(b), name
        assert a.__dict__.keys() == b.__dict__.keys(), name
    for a, b in zip(model.parameters(), original.parameters(), strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)
    y, launches = run(model, x)
    assert torch.equal(y, run(original, x)[0]) and launches == 0


def test_revert_leaves_a_model_that_was_never_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), tritonconv.nn.Conv2d(4, 4, 1))
    model[1].backend = "torch"
    tritonconv.revert(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert type(model[1]) is tritonconv.nn.Conv2d and model[1].backend == "torch"
    # The user's own layer of ours keeps its backend through convert and back.
    tritonconv.convert(model, inplace=True)
    assert model[1].backend == "torch"
    tritonconv.revert(tritonconv.convert(model, inplace=True, backend="triton"))
    assert model[1].backend == "torch" and model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_converting_twice_is_converting_once() -> None:
    original, x = build(RESNET)
    converted = tritonconv.convert(tritonconv.convert(original), inplace=True)
    y, launches = run(converted, x)
    assert_as_good(y, original, x)
    assert launches == RESNET.launches
    assert type(tritonconv.revert(converted).conv1) is nn.Conv2d and converted.conv1.weight.is_contiguous()


def test_parts_may_be_converted_before_the_whole() -> None:
    original, x = build(RESNET)
    model = copy.deepcopy(original)
    tritonconv.convert(model.layer1, inplace=True)
    assert run(model, x)[1] == 2
    y, launches = run(tritonconv.convert(model), x)
    assert_as_good(y, original, x)
    assert launches == RESNET.launches


def test_a_bare_layer_is_converted() -> None:
    conv = nn.Conv2d(3, 8, 3)
    converted = tritonconv.convert(conv)
    assert type(converted) is tritonconv.nn.Conv2d and type(conv) is nn.Conv2d
    x = torch.randn(1, 3, 5, 5)
    assert run(converted, x)[1] == 1
    assert_as_good(run(converted, x)[0], conv, x)
    assert type(tritonconv.revert(converted)) is nn.Conv2d


def test_the_backend_is_every_layers_own() -> None:
    original, x = build(RESNET)
    y, launches = run(tritonconv.convert(original, backend="torch"), x)
    assert launches == 0
    assert_as_good(y, original, x)
    block = nn.Sequential(tritonconv.nn.ConvBNAct2d(3, 8, 3)).eval()
    assert run(tritonconv.convert(block, backend="torch"), x)[1] == 0
    integer = tritonconv.convert(nn.Conv2d(1, 1, 1, bias=False), backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for"):
        integer.to(torch.complex64)(torch.ones(1, 1, 2, 2, dtype=torch.complex64))


def test_wrong_arguments_say_so() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        tritonconv.convert(nn.Linear(2, 2), backend="cudnn")
    for function in (tritonconv.convert, tritonconv.revert, tritonconv.explain):
        with pytest.raises(TypeError, match=r"must be torch.nn.Module, not dict"):
            function({})


@pytest.mark.parametrize("state", ["fresh", "copied", "unpickled"])
def test_torch_compile_takes_the_fused_forward(state: str) -> None:
    original, x = build(RESNET)
    model = tritonconv.convert(original)
    if state != "fresh":
        model = copy.deepcopy(model) if state == "copied" else pickle.loads(pickle.dumps(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y, launches = run(compiled, x)
    assert_as_good(y, original, x)
    assert launches == RESNET.launches
    if state == "fresh":
        # Back in training mode it is compiled again, as the original would be.
        torch.testing.assert_close(run(compiled.train(), x)[0], run(original.train(), x)[0], rtol=1e-4, atol=1e-5)


def test_torch_export_takes_the_fused_forward() -> None:
    original, x = build(RESNET)
    model = tritonconv.convert(original)
    with torch.no_grad():
        program = tritonconv.fuse(torch.export.export(model, (x,)))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    # All but the pooling and the average.
    assert targets.count("tritonconv.conv.default") == RESNET.launches - 2
    assert not any("batch_norm" in target or "relu" in target for target in targets)
    assert set(program.state_dict) == set(original.state_dict())
    assert_as_good(run(program.module(), x)[0], original, x)


def test_functional_call_and_autocast_reach_the_fused_layers(device: str) -> None:
    original, x = build(RESNET)
    converted = tritonconv.convert(original)
    other = {name: 1.5 * p for name, p in original.named_parameters()}
    with torch.no_grad():
        expected = torch.func.functional_call(original, other, (x,))
        torch.testing.assert_close(torch.func.functional_call(converted, other, (x,)), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast(device, torch.bfloat16):
            y = converted(x)
        truth = copy.deepcopy(original).double()(x.double())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), truth, rtol=0.1, atol=0.1)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.scale = 1.0

    def forward(self, x: Tensor, skip: Tensor | None = None, *, twice: bool = False) -> Tensor:
        y = torch.relu(self.conv(x)) * self.scale
        if skip is not None:
            y = y + skip
        return 2 * y if twice else y


def test_optional_arguments_take_the_models_own_forward() -> None:
    model = Optional().eval()
    converted = tritonconv.convert(model)
    x, skip = torch.randn(2, 3, 4, 4), torch.randn(2, 8, 4, 4)
    assert inspect.signature(converted.forward) == inspect.signature(model.forward)
    for args, kwargs in [((x,), {}), ((), {"x": x}), ((x, None), {}), ((x,), {"twice": False}), ((x, skip), {}),
                         ((x,), {"skip": skip, "twice": True}), ((x,), {"twice": True})]:  # fmt: skip
        with torch.no_grad():
            torch.testing.assert_close(converted(*args, **kwargs), model(*args, **kwargs))
    for bad in [(), (x, skip, True)]:
        with pytest.raises(TypeError):
            converted(*bad)
    with pytest.raises(TypeError):
        converted(x, unknown=1)


def test_attributes_and_submodules_changed_later_are_seen() -> None:
    model = Optional().eval()
    converted = tritonconv.convert(model)
    x = torch.randn(2, 3, 4, 4)
    before, _ = run(converted, x)
    converted.scale = 3.0
    torch.testing.assert_close(run(converted, x)[0], 3 * before)
    converted.conv = nn.Conv2d(3, 8, 1)
    y, launches = run(converted, x)
    torch.testing.assert_close(y, 3 * torch.relu(converted.conv(x)).detach(), rtol=1e-4, atol=1e-5)
    # In the graph a layer of torch's is fused like any other.
    assert launches == 1


@pytest.mark.parametrize("change", [
    lambda m: m.scales.append(5.0),
    lambda m: m.names.update(a=2.0),
    lambda m: setattr(m, "negative", True),
])  # fmt: skip
def test_collections_and_new_attributes_changed_later_are_seen(change) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.scales, self.names = [1.0, 2.0], {"a": 1.0}

        def forward(self, x: Tensor) -> list[Tensor]:
            y = torch.relu(self.conv(x)) * self.names["a"]
            return [(-y if getattr(self, "negative", False) else y) * scale for scale in self.scales]

    model, x = Scaled().eval(), torch.randn(1, 3, 4, 4)
    converted = tritonconv.convert(model, backend="torch")
    run(converted, x)
    change(model)
    change(converted)
    torch.testing.assert_close(run(converted, x)[0], run(model, x)[0])


@pytest.mark.parametrize("name", ["0", "1", "2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_set_on_a_member_is_called(name: str, when: str) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    x = torch.randn(1, 3, 4, 4)
    converted = model
    for step in ("before", "convert", "after"):
        if step == "convert":
            converted = tritonconv.convert(model, inplace=True)
        elif step == when:
            model.get_submodule(name).forward = torch.neg
    y, _ = run(converted, x)
    torch.testing.assert_close(y, run(tritonconv.revert(converted), x)[0], rtol=1e-4, atol=1e-5)


def test_a_model_around_a_scripted_module_is_fused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), scripted).eval()
    x = torch.randn(1, 3, 4, 4)
    expected, _ = run(model, x)
    converted = tritonconv.convert(model, inplace=True)
    torch.testing.assert_close(run(converted, x)[0], expected, rtol=1e-4, atol=1e-5)
    assert tritonconv.explain(converted, x).to_dict()["layers"][0]["fused"] == ["1"]


def test_a_forward_set_on_the_instance_is_left_alone() -> None:
    model = ResNet().eval()
    mine = lambda x: x + 1  # noqa: E731 - as users write it
    model.layer2[0].conv1.forward = mine
    model.forward = lambda x: model.layer1(model.layer2[0].conv1(x))
    x = torch.randn(1, 8, 4, 4)
    expected, _ = run(model, x)
    converted = tritonconv.convert(model, inplace=True)
    assert converted.layer2[0].conv1.forward is mine
    y, launches = run(converted, x)
    assert launches == 2
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_every_model_class_is_kept_with_its_methods() -> None:
    for kind in (ResNet, LeNet, Functional, Grouped, Untraceable, Shared):
        model = kind()
        assert type(tritonconv.convert(model)) is kind
    block = randomize(BasicBlock(8, 8))
    # A submodule called by itself runs too.
    model = nn.Sequential(block)
    converted = tritonconv.convert(model)
    x = torch.randn(1, 8, 4, 4)
    assert_as_good(run(converted[0], x)[0], block, x)


def test_a_model_that_is_converted_in_inference_mode_is_like_any_other() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
    with torch.inference_mode():
        fast = tritonconv.convert(model)
        weight = fast[1].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_inference()
    fast(torch.randn(1, 3, 8, 8)).sum().backward()
    assert weight.grad is not None
