"""From what a user types to a model without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tract_hub.errors import TractError
from tract_hub.names import did_you_mean
from tract_hub.studies.models.huggingface import refuse_foreign_code
from tract_hub.studies.models.torchvision import torchvision_builders


def build_without_weights(builder: Callable[[], nn.Module]) -> nn.Module:
    """Build on the meta device, or else on the CPU: some compute with their weights' values."""
    try:
        with torch.device("meta"):
            return builder()
    except Exception:
        return builder()


def model_named(name: str) -> nn.Module:
    """Build the model of this name: of timm, ``torchvision:NAME``, or of Transformers.

    Args:
        name: the last is a model type, such as ``vit``, or a local folder or ``config.json``.

    Raises:
        TractError: there is no such model; the message has the nearest names.

    """
    if name.startswith("torchvision:"):
        return build_without_weights(_torchvision(name.removeprefix("torchvision:")))
    if Path(name).exists():
        return build_without_weights(_from_config_file(Path(name)))
    if "/" in name:
        raise TractError(
            f"there is no model {name!r}, for no such folder or file is here, and nothing is "
            "downloaded: pass the folder of a model that was, or a name of timm or Transformers"
        )
    return build_without_weights(_of_timm_or_transformers(name))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    builders = torchvision_builders()
    if name not in builders:
        raise _unknown(f"torchvision:{name}", (f"torchvision:{known}" for known in builders))
    return builders[name]


def _of_timm_or_transformers(name: str) -> Callable[[], nn.Module]:
    import timm
    from transformers import CONFIG_MAPPING

    architectures = timm.list_models()
    if name.partition(".")[0] in architectures:
        return lambda: timm.create_model(name)
    if name in CONFIG_MAPPING:
        return lambda: _from_config(CONFIG_MAPPING[name]())
    raise _unknown(name, [*architectures, *CONFIG_MAPPING])


def _from_config_file(path: Path) -> Callable[[], nn.Module]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        refuse_foreign_code(path, error)
        raise TractError(
            f"{path} holds no configuration of Transformers ({error}): pass a folder that "
            "save_pretrained wrote, or its config.json"
        ) from error
    return lambda: _from_config(config)


def _from_config(config: Any) -> nn.Module:
    import transformers

    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            model: nn.Module = getattr(transformers, architecture)(config)
            return model
    built: nn.Module = transformers.AutoModel.from_config(config, trust_remote_code=False)
    return built


def _unknown(name: str, known: Iterable[str]) -> TractError:
    return TractError(f"there is no model {name!r}; {did_you_mean(name, known)}")
