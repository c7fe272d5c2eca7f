"""Models inside others: compiled, parallel, averaged, adapted, hooked, patched, normalised."""

import functools
import os

import pytest
import timm
import torch
from torch import nn

import tract_hub


@pytest.fixture
def model():
    return timm.create_model("resnet10t", num_classes=3)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def found(model):
    stems = tract_hub.locate(model)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for stem in stems:
        assert stem.weight_name in parameters
        assert modules[stem.module_name] is stem.module
        assert all(site.module_name in modules for site in stem.sites)
    return [stem.weight_name for stem in stems]


STEM = "conv1.0.weight"


def test_compiled(model) -> None:
    assert found(torch.compile(model)) == [f"_orig_mod.{STEM}"]
    model.compile()
    assert found(model) == [STEM]


def test_compiled_in_part(model) -> None:
    model.conv1 = torch.compile(model.conv1)
    model.layer1 = torch.compile(model.layer1)
    assert found(model) == ["conv1._orig_mod.0.weight"]


def test_data_parallel(model) -> None:
    assert found(nn.DataParallel(model)) == [f"module.{STEM}"]


def test_distributed(model, process_group) -> None:
    parallel = nn.parallel.DistributedDataParallel(model)
    assert found(parallel) == [f"module.{STEM}"]
    assert found(torch.compile(parallel)) == [f"_orig_mod.module.{STEM}"]


def test_fully_sharded(model, process_group) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.layer1, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert found(model) == [STEM]


def test_first_generation_of_fsdp(model, process_group) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    names = [stem.weight_name for stem in tract_hub.locate(sharded)]
    assert names == [f"_fsdp_wrapped_module.{STEM}"]


def test_flattened_parameters_are_refused(model, process_group) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with pytest.raises(tract_hub.ExampleInputError, match="before wrapping"):
        tract_hub.locate(sharded)


def test_averaged(model) -> None:
    from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
    from torch.optim.swa_utils import AveragedModel

    for average in (AveragedModel, ModelEmaV2, ModelEmaV3):
        assert found(average(model)) == [f"module.{STEM}"]
    assert found(ModelEma(model).ema) == [STEM]


@pytest.mark.parametrize("dora", [False, True])
def test_low_rank_adapter_on_the_stem(model, dora) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["conv1.0"], use_dora=dora)
    adapted = peft.get_peft_model(model, config)
    layer = "base_model.model.conv1.0"
    assert found(adapted) == [f"{layer}.base_layer.weight", f"{layer}.lora_A.default.weight"]


def test_adapter_elsewhere_with_a_trained_stem(model) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["fc"], modules_to_save=["conv1.0"])
    adapted = peft.get_peft_model(model, config)
    assert found(adapted) == ["base_model.model.conv1.0.modules_to_save.default.weight"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_by_accelerate(model, precision) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    prepared = Accelerator(cpu=True, mixed_precision=precision).prepare(model)
    AcceleratorState._reset_state(True)
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        os.environ.pop(name, None)
    assert found(prepared) == [STEM]


def test_offloaded_by_accelerate(model) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))
    assert found(model) == [STEM]


def test_patched_forward_that_holds_the_original(model) -> None:
    original = model.forward

    @functools.wraps(original)
    def forward(x):
        return original(2 * x - 1)

    model.forward = forward
    (stem,) = tract_hub.locate(model)
    assert (stem.weight_name, stem.path) == (STEM, ("mul", "sub"))


class _RunsAnother(nn.Module):
    def forward(self, x):
        return LIVE(x)


LIVE = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_model_behind_a_global_name_is_refused_and_not_run() -> None:
    holder = _RunsAnother()
    holder.inner = LIVE
    with pytest.raises(tract_hub.ExampleInputError, match="original"):
        tract_hub.locate(holder)
    assert LIVE[1].num_batches_tracked == 0


class _Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))

    def forward(self, x):
        return (x - self.mean) / 0.25


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vit_tiny_patch16_384", "1.patch_embed.proj.weight"), ("resnet10t", f"1.{STEM}")],
)
def test_model_of_a_zoo_behind_a_fixed_transform(name, expected) -> None:
    wrapped = nn.Sequential(_Normalised(), timm.create_model(name))
    (stem,) = tract_hub.locate(wrapped)
    assert (stem.weight_name, stem.path) == (expected, ("sub", "div"))


def test_traced_by_fx(model) -> None:
    assert found(torch.fx.symbolic_trace(model)) == [STEM]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(model, dtype) -> None:
    assert found(model.to(dtype)) == [STEM]


def test_frozen_and_in_eval_mode(model) -> None:
    assert found(model.requires_grad_(False).eval()) == [STEM]
