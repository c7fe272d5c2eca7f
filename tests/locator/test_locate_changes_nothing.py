"""``locate`` only looks: everything about the model and the process is as it was."""

import random

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tract_hub
from tract_hub.locator.meta_copy import SMALL, meta_copy


class Caching(nn.Module):
    """Keeps tensors, also such with a gradient, in attributes, dicts and lists."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.calls, self.cache = nn.Dropout(0.5), 0, {}

    def forward(self, x):
        self.calls += 1
        self.last = self.dropout(self.norm(self.conv(x)))
        self.cache["scaled"] = [2 * self.conv.weight]
        return self.last.mean()


def models():
    caching = Caching()
    caching(torch.randn(2, 3, 8, 8)).backward()
    used = timm.create_model("efficientformerv2_s0").eval()
    used(torch.zeros(1, 3, 224, 224))  # caches what it computed from its parameters
    half = timm.create_model("resnet10t").half().eval()
    frozen = timm.create_model("vit_tiny_patch16_224").requires_grad_(False)
    return {"caching": caching, "used": used, "half": half, "frozen": frozen}


def snapshot(model):
    state = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            state[name, key] = (
                id(value),
                repr(value) if not isinstance(value, dict) else len(value),
            )
            if isinstance(value, dict):
                state[name, key, "items"] = [(k, id(v)) for k, v in value.items()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
        state[name] = (id(tensor), tensor._version, tensor.requires_grad, grad, tensor.clone())
    return state


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", ["caching", "used", "half", "frozen"])
def test_model_is_as_before(name) -> None:
    model = models()[name]
    before = snapshot(model)
    tract_hub.locate(model)
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == []


def test_random_states_and_modes_are_as_before() -> None:
    model = models()["caching"]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    python_state, autocast = random.getstate(), torch.amp.autocast.__init__
    tract_hub.locate(model)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert all(map(np.array_equal, numpy_state, np.random.get_state()))
    assert python_state == random.getstate()
    assert torch.amp.autocast.__init__ is autocast
    assert torch.is_grad_enabled()


def test_hooks_of_the_user_are_not_called() -> None:
    model, calls = timm.create_model("resnet10t"), []
    model.conv1.register_forward_hook(lambda *_: calls.append("forward"))
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    tract_hub.locate(model)
    assert calls == []


class _LargestAllocation(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not output.is_meta:
            self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_no_memory_for_a_second_set_of_weights(name) -> None:
    model = timm.create_model(name)
    with _LargestAllocation() as allocations:
        tract_hub.locate(model)
    assert allocations.largest <= SMALL
    assert all(parameter.is_meta for parameter in meta_copy(model).parameters())
