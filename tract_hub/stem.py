"""What a first layer is: the one thing that finding, attaching and reporting share."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Site:
    """A module whose forward applies the weight.

    Attributes:
        module_name: the module's name in the model; ``""`` is the model itself.
        operation: the torch function that applies it: ``"conv2d"``, ``"linear"``, …
        parameters: the parameters that the weight is made of, as dotted names below that module.

    """

    module_name: str
    operation: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Stem:
    """One first layer: a parametric linear map whose input is the pixels.

    Attributes:
        weight_name: name of its parameter in ``model.named_parameters()``.
        module_name: name of the module that holds it.
        module: that module.
        in_features: n, the features of one row of its unfolded input (in one group).
        operation: the torch function that applies it.
        geometry: kernel, stride, padding, dilation and groups in words; empty for a Linear.
        path: the operations between the pixels and it.
        sites: where it is applied; usually one.
        uses: how often it is applied in one forward.
        derived: whether the operation uses a weight computed from the parameter.
        notes: what a user should know, such as that a trainable layer stands in front of it.
        reason: why this is a first layer, in words.

    """

    weight_name: str
    module_name: str
    module: nn.Module = field(repr=False, compare=False)
    in_features: int
    operation: str
    geometry: str = ""
    path: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    uses: int = 1
    derived: bool = False
    notes: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        shape = f"{self.operation} {self.geometry}".strip()
        return f"{self.weight_name}: {shape}, n = {self.in_features}; {self.reason}"


def holder_of(parameter: str) -> str:
    """Return the name of the module whose parameter this is, or whose weight it parametrizes."""
    before, parametrized, _ = f".{parameter}".partition(".parametrizations.")
    path = before if parametrized else before.rpartition(".")[0]
    return path.removeprefix(".")
