"""Build any model by its name, with the classes and the image size that data ask for."""

from __future__ import annotations

import ast
import inspect
import logging
import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from torchvision.models import get_model_builder, list_models

from tract_hub.errors import ModelError, TractError, first_line
from tract_hub.names import did_you_mean
from tract_hub.studies.data import ImageData
from tract_hub.studies.settings import Compare


class ConvStem(nn.Module):
    """Two 3 × 3 convolutions of stride 2 in place of a ViT's patches of 4 × 4 pixels."""

    def __init__(
        self, img_size: int, in_chans: int, embed_dim: int, patch_size: int, **_: Any
    ) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] ** 2
        self.conv1 = nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(embed_dim // 2)
        self.conv2 = nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return one token for each 4 × 4 pixels: batch × tokens × features."""
        features: Tensor = self.conv2(torch.relu(self.norm(self.conv1(images))))
        return features.flatten(2).transpose(1, 2)


def _resnet(width: int, norm_in_front: bool = True, **options: Any) -> Any:
    """A ResNet-18 of a width whose stem is 3 × 3 with stride 1, as the paper's for 32 × 32 images.

    The max-pool stays, as it does there. At width 20 it takes 35 MFLOP an image of 32 × 32.
    """
    options.pop("img_size", None)
    channels = tuple(width * 2**i for i in range(4))
    model = timm.create_model("resnet18", channels=channels, **options)
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not norm_in_front:
        model.bn1 = nn.Identity()
    return model


def _vit(**options: Any) -> Any:
    small = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **{**small, **options})


OWN: dict[str, Callable[..., nn.Module]] = {
    "narrow-resnet18": partial(_resnet, width=20),
    "narrow-resnet18-bare": partial(_resnet, width=20, norm_in_front=False),
    "resnet18-small-images": partial(_resnet, width=64),
    "small-vit": _vit,
    "conv-vit": partial(_vit, embed_layer=ConvStem),
    "cifar-vit": partial(_vit, embed_dim=384, depth=7, num_heads=12),
}
"""Models for small images: what the studies train; `-bare` has no batch normalisation between the
first layer and the next."""


def build_model(
    name: str,
    *,
    classes: Sequence[str] = (),
    channels: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
    arguments: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a model from the current random state, on the current default device.

    Names are those of ``OWN``; of timm (``resnet18``, ``hf-hub:timm/…``); ``torchvision:NAME``; a
    Hugging Face folder or ``config.json``, a hub id, or a model type (``vit``); and
    ``FILE.py:FUNCTION``. What is not given is as the model has it; a folder's weights are taken
    without ``pretrained`` too. The arguments are further ones, for timm's models and functions.

    Example:
        >>> build_model("narrow-resnet18", classes="ab", channels=1)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 2])

    """
    wanted = {"num_classes": len(classes) or None, "in_chans": channels, "img_size": image_size}
    options = {key: value for key, value in wanted.items() if value is not None}
    extra = arguments or {}
    clash = sorted({"num_classes", "in_chans", "img_size"} & set(extra) & set(options))
    if clash:
        raise ModelError(f"--model-arg {clash[0]} is decided by the data: leave it out")
    file, _, function = name.partition(".py:")
    try:
        if name in OWN:
            if pretrained:
                raise ModelError(f"{name} has no published weights: leave out --pretrained")
            return OWN[name](**options, **extra)
        if function:
            return _from_file(Path(f"{file}.py").expanduser(), function, options | extra)
        if name.startswith("torchvision:"):
            return _torchvision(name.removeprefix("torchvision:"), options, pretrained)
        model: nn.Module = _named(name, classes, options, pretrained, extra)
        return model
    except TractError:
        raise
    except Exception as error:  # code of four zoos, and the user's: it may raise anything
        raise ModelError(f"{name} cannot be built: {first_line(error)}") from error


def build_classifier(settings: Compare, data: ImageData, size: int | None) -> nn.Module:
    """Build the model that a comparison asks for, for its data at an image size."""
    return build_model(
        settings.model,
        classes=data.classes,
        channels=data.channels,
        image_size=size,
        pretrained=settings.pretrained,
        arguments=parsed_arguments(settings.model_arg),
    )


def build_without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Build on the meta device, or else on the CPU: some compute with their weights' values."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:
        return build()


def parsed_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Return ``["depth=4"]`` as ``{"depth": 4}``; a ModelError where one has no name."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ModelError(f"--model-arg must look like depth=4, got {pair!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def logits_of(output: Any) -> Tensor:
    """Return the class scores in what a model returned: batch × classes; a ModelError without."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        kind = type(output).__name__
        raise ModelError(f"the model returns {kind}, not class scores; choose a classifier")
    return logits


def own_size(model: nn.Module) -> int | None:
    """Return the image size that a model was published for, in pixels."""
    published: Any = getattr(model, "pretrained_cfg", None) or {}
    size = getattr(getattr(model, "config", None), "image_size", None)
    size = published.get("input_size", [size])[-1]
    size = size[0] if isinstance(size, (list, tuple)) else size
    return int(size) if size else None


def usual_recipe(settings: Compare, model: nn.Module) -> Compare:
    """Fill in what is left open by what timm's ``train.py`` usually trains a model's kind with.

    Models with layer normalisation (ViT, Swin, ConvNeXt): AdamW, 1e-3 at a batch of 1024 and as
    its square root, weight decay 0.05, label smoothing. Others: SGD, 0.1 at a batch of 256 and in
    proportion, weight decay 1e-4. Both scale as timm's ``--lr-base``, and warm up.
    """
    batch, warmup = settings.batch_size, min(5.0, max(settings.epochs) / 10)
    if any("LayerNorm" in type(module).__name__ for module in model.modules()):
        optimizer, lr, decay, smoothing = "adamw", 1e-3 * (batch / 1024) ** 0.5, 0.05, 0.1
    else:
        optimizer, lr, decay, smoothing = "sgd", 0.1 * batch / 256, 1e-4, 0.0
    open_ = {"weight_decay": decay, "warmup": warmup, "label_smoothing": smoothing}
    filled: dict[str, Any] = {k: v for k, v in open_.items() if getattr(settings, k) is None}
    if settings.optimizer == "usual":
        filled["optimizer"] = optimizer
    return replace(settings, lr=settings.lr or (lr,), **filled)


def _from_file(path: Path, function: str, options: dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    defined = runpy.run_path(str(path))
    build = defined.get(function)
    if not callable(build):
        functions = [name for name, value in defined.items() if callable(value)]
        raise ModelError(f"{path.name} has no {function!r}; {did_you_mean(function, functions)}")
    takes = inspect.signature(build).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    model = build(**{key: value for key, value in options.items() if every or key in takes})
    if not isinstance(model, nn.Module):
        raise ModelError(f"{function} returns {type(model).__name__}, no torch.nn.Module")
    return model


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """Build a model of torchvision, without weights if none are asked for; in float."""
    builder = get_model_builder(name)
    takes = inspect.signature(builder).parameters
    fixed: dict[str, Any] = {k: None for k in ("weights", "weights_backbone") if k in takes}
    fixed |= {"quantize": False} if "quantize" in takes else {}
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        fixed["init_weights"] = False  # their own default warns
    model: nn.Module = builder(**{**fixed, **options})
    return model


def _torchvision(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    if name not in list_models():
        raise ModelError(f"torchvision has no model {name!r}; {did_you_mean(name, list_models())}")
    if options.get("in_chans", 3) != 3:
        raise ModelError("torchvision's models take 3 channels: pass --channels 3")
    classes = {k: v for k, v in options.items() if k == "num_classes"}
    if not pretrained:
        return torchvision_model(name, **classes)
    model = torchvision_model(name, weights="DEFAULT")
    heads = [(at, layer) for at, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if classes and heads:
        at, head = heads[-1]
        parent, _, leaf = at.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Linear(head.in_features, *classes.values()))
    return model


def _named(
    name: str, classes: Sequence[str], options: dict[str, Any], pretrained: bool, extra: Any
) -> Any:
    """Build what a name of timm or Transformers, a folder, or a hub id stands for."""
    path = Path(name).expanduser()
    if path.exists():
        return _transformers(str(path), classes, options, True)
    if timm.is_model(name.partition(".")[0]) or name.startswith(("hf-hub:", "local-dir:")):
        return _timm(name, options, pretrained, extra)
    if name in transformers.CONFIG_MAPPING:
        return _transformers(name, classes, options, False)
    if "/" not in name:
        known = [*OWN, *timm.list_models(), *transformers.CONFIG_MAPPING]
        raise ModelError(f"there is no model {name!r}; {did_you_mean(name, known)}")
    if name.startswith((".", "~", "/")):
        raise ModelError(f"there is no folder {name}")
    if name.startswith("timm/"):
        return _timm(f"hf-hub:{name}", options, pretrained, extra)
    return _transformers(name, classes, options, pretrained)


def _timm(name: str, options: dict[str, Any], pretrained: bool, extra: Any) -> Any:
    try:
        try:
            return timm.create_model(name, pretrained, **options, **extra)
        except TypeError as error:
            # Most convolutional models take any size, and so have no such argument.
            if "img_size" not in str(error):
                raise
            options = {key: value for key, value in options.items() if key != "img_size"}
            return timm.create_model(name, pretrained, **options, **extra)
    except (OSError, RuntimeError) as error:
        if not (pretrained or name.startswith("hf-hub:")) or "size mismatch" in str(error):
            raise
        raise _not_fetched(name, error) from error


def _not_fetched(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name} could not be fetched ({type(error).__name__}): no network, no such model, no "
        "published weights, or a login is asked for; leave out --pretrained, or download it "
        "(hf download) and pass its folder"
    )


def _transformers(name: str, classes: Sequence[str], options: dict[str, Any], weights: bool) -> Any:
    """Build a model of Transformers from a folder, a config file, a hub id or a model type."""
    path = Path(name)
    loading = {"trust_remote_code": False, "local_files_only": path.exists()}
    if path.exists():
        if path.is_dir() and not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: pass a folder that save_pretrained wrote")
        weights = any(path.glob("*.safetensors"))
        if not weights and any(path.glob("*.bin")):
            raise ModelError(
                f"{path.name} has its weights in .bin files, which can run code; save them as "
                "safetensors (save_pretrained does), or remove them to start anew"
            )
    try:
        if not path.exists() and name in transformers.CONFIG_MAPPING:
            config = transformers.CONFIG_MAPPING[name]()
        else:
            config = transformers.AutoConfig.from_pretrained(name, **loading)
        if not classes:
            known = [c for c in config.architectures or () if hasattr(transformers, c)]
            if known:
                return getattr(transformers, known[0])(config)
            return transformers.AutoModel.from_config(config, trust_remote_code=False)
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: i for i, label in enumerate(classes)}
        channels = options.get("in_chans")
        had = getattr(config, "num_channels", channels)
        if weights and channels not in (None, had):
            raise ModelError(
                f"the weights of {path.name} are for {had} channels, the images have {channels}: "
                f"convert them by --channels {had}"
            )
        auto = transformers.AutoModelForImageClassification
        if not weights:
            for key, value in (("num_channels", channels), ("image_size", options.get("img_size"))):
                if value is not None and hasattr(config, key):
                    setattr(config, key, value)
            return auto.from_config(config, trust_remote_code=False)
        log = transformers.utils.logging  # its reports and bars would tear a study's own lines
        verbosity = log.get_verbosity()
        log.set_verbosity(logging.CRITICAL)
        log.disable_progress_bar()
        model = auto.from_pretrained(
            name, config=config, use_safetensors=True, ignore_mismatched_sizes=True, **loading
        )
        log.set_verbosity(verbosity)
        return model
    except OSError as error:
        if path.exists():
            raise
        raise _not_fetched(name, error) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{path.name} is built by code of its own (auto_map in its config.json), which is "
                "not run here: call tract_hub.enable in a script of yours"
            ) from error
        if "Unrecognized configuration class" in str(error):
            raise ModelError(f"{path.name} is no image classifier: choose another model") from error
        raise
