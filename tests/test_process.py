"""Nothing outside a model changes, and nothing of a user's is kept: whatever is done with TrAct."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tract_hub
from tests.process_state import state_of_process

SCOPES = pytest.mark.parametrize("scope", ["local", "global"])


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()


def callback(model: nn.Module, scope: str) -> None:
    tract_hub.TractCallback(0.1, scope=scope)


ACTIONS: dict[str, Callable[[nn.Module, Any], object]] = {
    "enable": lambda model, scope: tract_hub.enable(model, scope=scope),
    "another λ": lambda model, scope: tract_hub.enable(model, 0.2, scope=scope),
    "status": lambda model, scope: str(tract_hub.status(model)) + repr(model),
    "deepcopy": lambda model, scope: copy.deepcopy(model),
    "pickle": lambda model, scope: pickle.loads(pickle.dumps(model)),
    "train": lambda model, scope: (train(model), tract_hub.disable(model)),
    "callback": callback,
    "disable": lambda model, scope: tract_hub.disable(model),
    "disable once more": lambda model, scope: tract_hub.disable(model),
}


@SCOPES
def test_no_action_changes_the_process_or_compiles_others_anew(scope: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    other, x = torch.compile(build(), backend=backend), torch.ones(2, 3, 8, 8)
    other(x)
    assert len(graphs) == 1
    train(pickle.loads(pickle.dumps(build())))  # Python and torch note their classes then
    model = build()
    before = state_of_process()
    for name, act in ACTIONS.items():
        act(model, scope)
        after = state_of_process()
        assert {key for key in before if before[key] != after[key]} == set(), name
        other(x)
        assert len(graphs) == 1, name


IMPORT = """
import sys
from tests.process_state import state_of_process
assert "tract_hub" not in sys.modules
before = state_of_process()
import tract_hub
tract_hub.enable, tract_hub.TractCallback, tract_hub.locate
after = state_of_process()
print([key for key in before if before[key] != after[key]])
"""


def in_a_process(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_import_changes_nothing() -> None:
    assert in_a_process(IMPORT).strip() == "[]"


@SCOPES
def test_a_users_tensors_end_with_their_names(scope: str) -> None:
    model = tract_hub.enable(build(), scope=scope)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gc.disable()  # not even in a cycle
    try:
        for learns in (True, False, True):
            x = torch.randn(2, 3, 8, 8)
            features = model[:3](x)
            loss = model[3](features).sum()
            kept = [weakref.ref(tensor) for tensor in (x, features, loss)]
            if learns:
                loss.backward()
                kept.append(weakref.ref(model[0].weight.grad))
                optimizer.step()
                optimizer.zero_grad()
            del x, features, loss
            assert [tensor() is None for tensor in kept] == [True] * len(kept)
    finally:
        gc.enable()
    kept = [weakref.ref(thing) for thing in (model, *model.parameters(), *model.modules())]
    del model, optimizer
    gc.collect()
    assert [thing() is None for thing in kept] == [True] * len(kept)


LOAD = """
import copy, json, pickle, sys, warnings
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "tract_hub":
            raise ModuleNotFoundError("No module named 'tract_hub'")
warnings.simplefilter("error", UserWarning)
if sys.argv[1] == "without":
    sys.meta_path.insert(0, Block())
else:
    import tract_hub
import torch
model = torch.load(sys.argv[2], weights_only=False)
twins = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
for twin in twins:
    twin.zero_grad()
    twin(torch.ones(2, 3, 8, 8).cumsum(-1) - 4).sum().backward()
print(json.dumps([[t[0].weight.grad.norm().item(), "TrAct" in repr(t)] for t in twins]))
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[str]:
    torch.save(tract_hub.enable(build(), damping="relative"), tmp_path / "model.pt")
    return str(tmp_path / "model.pt")


@pytest.mark.parametrize("where", ["without", "with"])
def test_a_pickle_is_the_ordinary_model_where_tract_hub_is_not(where: str, file: str) -> None:
    model = build()
    if where == "with":
        tract_hub.enable(model, damping="relative")
    model(torch.ones(2, 3, 8, 8).cumsum(-1) - 4).sum().backward()
    for norm, says_tract in json.loads(in_a_process(LOAD, where, file)):
        assert norm == pytest.approx(model[0].weight.grad.norm().item(), rel=1e-5)
        assert says_tract is (where == "with")
