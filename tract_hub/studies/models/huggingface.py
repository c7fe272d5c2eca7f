"""Image classifiers from a local Hugging Face folder, without anybody's code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tract_hub.errors import ModelError, first_line


def huggingface_builder(
    folder: Path, channels: int, classes: tuple[str, ...]
) -> Callable[[int | None], nn.Module]:
    """Return what builds the folder's model for so many channels and classes.

    A folder with ``*.safetensors`` starts from these weights (the head anew where the classes
    differ), at the image size that they were trained for; one with a config alone from a random
    start at any size.

    Args:
        folder: has a ``config.json``.
        channels: of the images.
        classes: names of the classes.

    Raises:
        ModelError: no config, another library's weights, or weights for other channels.

    """
    config = _config(folder)
    weighted = any(folder.glob("*.safetensors"))
    if not weighted and any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder.name} has its weights in .bin files, which can run code; "
            "save them as safetensors (save_pretrained does), or remove them to start anew"
        )
    if weighted and getattr(config, "num_channels", channels) != channels:
        raise ModelError(
            f"the weights in {folder.name} are for {config.num_channels} channels and the images "
            f"have {channels}; convert them with --channels {config.num_channels}"
        )

    def build(size: int | None) -> nn.Module:
        try:
            return _build(folder, channels, classes, None if weighted else size, weighted)
        except Exception as error:
            refuse_foreign_code(folder, error)
            raise

    return build


def refuse_foreign_code(path: Path, error: Exception) -> None:
    """Say that a model is made by code that came with it, if that is what an error is about.

    Raises:
        ModelError: it is.

    """
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"{path.name} is built by code of its own (auto_map in its config.json), which is not "
            "run here: build the model in a script of yours and call tract_hub.enable on it"
        ) from error


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json, so it is no Hugging Face model folder: pass one that "
            "save_pretrained wrote"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # JSON, validation and registry errors alike
        refuse_foreign_code(folder, error)
        raise ModelError(
            f"{folder.name}/config.json is not understood ({first_line(error)}): save the model "
            "again with this version of Transformers, or update it"
        ) from error


def _build(
    folder: Path, channels: int, classes: tuple[str, ...], size: int | None, weighted: bool
) -> nn.Module:
    from transformers import AutoModelForImageClassification

    config = _config(folder)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    for name, value in (("num_channels", channels), ("image_size", size)):
        if value is not None and hasattr(config, name):
            setattr(config, name, value)
    if not weighted:
        model: nn.Module = AutoModelForImageClassification.from_config(
            config, trust_remote_code=False
        )
        return model
    loaded: nn.Module = AutoModelForImageClassification.from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
    )
    return loaded
