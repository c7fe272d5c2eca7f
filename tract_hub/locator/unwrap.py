"""Modules that hold another model and hand their inputs to it."""

from __future__ import annotations

from torch import nn

_INNER = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "_FabricModule": "_forward_module",  # of Lightning Fabric
    "AveragedModel": "module",  # torch's EMA and SWA
    "ModelEma": "module",  # timm's
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "PeftModel": "base_model",
    "BaseTuner": "model",  # LoRA and the other methods of peft
}
"""Class name of a wrapper → the attribute with the model inside."""


def unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the model inside its wrappers, and what they put before its parameters' names."""
    for cls in type(model).__mro__:
        attribute = _INNER.get(cls.__name__, "")
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            innermost, below = unwrap(inner)
            return innermost, f"{attribute}.{below}"
    return model, ""
