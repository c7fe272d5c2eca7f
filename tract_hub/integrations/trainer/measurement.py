"""What TrAct does to the gradients of a model's first layers, where it is asked to be measured."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from tract_hub.method.measure import new_probe, read_probe
from tract_hub.surgery import stem_parameters

SCALED = ("grad_norm_before", "grad_norm_after")


class Measurement:
    """Measures the backward of every forward that begins until ``stop``.

    Args:
        model: TrAct is on it.

    """

    def __init__(self, model: nn.Module) -> None:
        self.scale = 1.0
        self.running = True
        self.probes = {
            uses: new_probe(parameters[0].device)
            for uses, parameters in stem_parameters(model).items()
        }
        for uses, probe in self.probes.items():
            uses.probe = probe

    def stop(self, optimizer: Optimizer | None = None) -> None:
        """Measure no more; a second time, it does nothing.

        Args:
            optimizer: as Accelerate prepared it; its scaler tells what the loss was scaled by.

        """
        if not self.running:
            return
        self.running = False
        for uses in self.probes:
            uses.probe = None
        scaler = getattr(optimizer, "scaler", None)
        self.scale = 1.0 if scaler is None else scaler.get_scale()

    def values(self) -> dict[str, float]:
        """Return what was measured, by name; waits for the device."""
        named = {}
        for uses, probe in self.probes.items():
            for quantity, value in read_probe(probe).items():
                unscaled = value / self.scale if quantity in SCALED else value
                named[f"tract/{uses.weight_name.removesuffix('.weight')}/{quantity}"] = unscaled
        return named
