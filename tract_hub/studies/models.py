"""Build any model by its name, with the classes and the image size that data ask for."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tract_hub.errors import ModelError, TractError, first_line
from tract_hub.names import did_you_mean
from tract_hub.studies.settings import Compare

_VIT = "vit_tiny_patch16_224"
_SMALL_VIT = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
_PAPERS_VIT = {"patch_size": 4, "embed_dim": 384, "depth": 7, "num_heads": 12}


class ConvStem(nn.Module):
    """Two 3 × 3 convolutions of stride 2 in place of a ViT's patches of 4 × 4 pixels."""

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 64,
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_patches = (img_size // 4) ** 2
        self.grid_size = (img_size // 4, img_size // 4)
        self.conv1 = nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(embed_dim // 2)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return one token for each 4 × 4 pixels: batch × tokens × features."""
        features = self.conv2(self.act(self.norm(self.conv1(images))))
        return features.flatten(2).transpose(1, 2)


def _small_resnet(width: int, norm_in_front: bool = True, **options: Any) -> nn.Module:
    """A ResNet-18 of a width whose stem is 3 × 3 with stride 1, as the paper's for 32 × 32 images.

    The max-pool stays, as it does there. At width 20 it takes 35 MFLOP an image of 32 × 32.
    """
    import timm

    options.pop("img_size", None)
    channels = tuple(width * 2**i for i in range(4))
    model: Any = timm.create_model("resnet18", channels=channels, **options)
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not norm_in_front:
        model.bn1 = nn.Identity()
    built: nn.Module = model
    return built


def _vit(**options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(_VIT, **options)
    return model


OWN: dict[str, Callable[..., nn.Module]] = {
    "narrow-resnet18": lambda **o: _small_resnet(20, **o),
    "narrow-resnet18-bare": lambda **o: _small_resnet(20, norm_in_front=False, **o),
    "resnet18-small-images": lambda **o: _small_resnet(64, **o),
    "small-vit": lambda **o: _vit(**{**_SMALL_VIT, **o}),
    "conv-vit": lambda **o: _vit(**{**_SMALL_VIT, "embed_layer": ConvStem, **o}),
    "cifar-vit": lambda **o: _vit(**{**_PAPERS_VIT, **o}),
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

    Args:
        name: one of ``OWN``; a name of timm (``resnet18``, ``hf-hub:timm/…``);
            ``torchvision:NAME``; a Hugging Face folder or ``config.json``, a hub id, or a model
            type (``vit``); or ``FILE.py:FUNCTION``.
        classes: names of the classes of a classifier; none: the model's own head.
        channels: of the images; None: the model's own.
        image_size: side in pixels; None: the model's own.
        pretrained: start from published weights; a folder's weights are taken in any case.
        arguments: further ones, for timm's models and functions.

    Raises:
        ModelError: there is no such model, or it cannot be built so; the message says what to do.

    Example:
        >>> build_model("narrow-resnet18", classes="ab", channels=1)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 2])

    """
    wanted = {"num_classes": len(classes) or None, "in_chans": channels, "img_size": image_size}
    options = {key: value for key, value in wanted.items() if value is not None}
    extra = dict(arguments or {})
    path, _, function = name.partition(".py:")
    try:
        if name in OWN:
            if pretrained:
                raise ModelError(f"{name} has no published weights: leave out --pretrained")
            return OWN[name](**options, **extra)
        if function:
            return _from_file(Path(f"{path}.py").expanduser(), function, options | extra)
        if name.startswith("torchvision:"):
            return _torchvision(name.removeprefix("torchvision:"), options, pretrained)
        if Path(name).expanduser().exists():
            return _hugging_face(str(Path(name).expanduser()), classes, options, True)
        return _by_name(name, classes, options, pretrained, extra)
    except TractError:
        raise
    except Exception as error:  # code of four zoos, and the user's: it may raise anything
        raise ModelError(f"{name} cannot be built: {first_line(error)}") from error


def build_without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Build on the meta device, or else on the CPU: some compute with their weights' values."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:
        return build()


def parsed_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Return ``["depth=4"]`` as ``{"depth": 4}``.

    Raises:
        ModelError: one has no name.

    """
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
    """Return the class scores in what a model returned: batch × classes.

    Raises:
        ModelError: there are none.

    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        kind = type(output).__name__
        raise ModelError(f"the model returns {kind}, not class scores; choose a classifier")
    return logits


def own_size(model: nn.Module) -> int | None:
    """Return the image size that a model was published for, in pixels."""
    published = getattr(model, "pretrained_cfg", None)
    if isinstance(published, dict) and "input_size" in published:
        return int(published["input_size"][-1])
    size = getattr(getattr(model, "config", None), "image_size", None)
    size = size[0] if isinstance(size, (list, tuple)) else size
    return int(size) if size else None


def usual_recipe(settings: Compare, model: nn.Module) -> Compare:
    """Fill in what is left open by what timm's ``train.py`` usually trains a model's kind with.

    Models with layer normalisation (ViT, Swin, ConvNeXt): AdamW, 1e-3 at a batch of 1024 and as
    its square root, weight decay 0.05, warm-up, label smoothing. Others: SGD, 0.1 at a batch of
    256 and in proportion, weight decay 1e-4 (timm's ``--lr-base`` scaling, both).
    """
    names = {type(module).__name__ for module in model.modules()}
    batch, longest = settings.batch_size, max(settings.epochs)
    if any("LayerNorm" in name for name in names):
        usual = ("adamw", 1e-3 * (batch / 1024) ** 0.5, 0.05, min(5.0, longest / 10), 0.1)
    else:
        usual = ("sgd", 0.1 * batch / 256, 1e-4, min(5.0, longest / 10), 0.0)
    optimizer, lr, weight_decay, warmup, smoothing = usual

    def given(value: float | None, other: float) -> float:
        return other if value is None else value

    return replace(
        settings,
        optimizer=optimizer if settings.optimizer == "usual" else settings.optimizer,
        lr=settings.lr or (lr,),
        weight_decay=given(settings.weight_decay, weight_decay),
        warmup=given(settings.warmup, warmup),
        label_smoothing=given(settings.label_smoothing, smoothing),
    )


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep Transformers' load reports and bars out of a study's own lines."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _from_file(path: Path, function: str, options: dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it is a file of Python
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        functions = [n for n, v in vars(module).items() if callable(v)]
        raise ModelError(f"{path.name} has no {function!r}; {did_you_mean(function, functions)}")
    takes = inspect.signature(build).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    model = build(**{k: v for k, v in options.items() if every or k in takes})
    if not isinstance(model, nn.Module):
        raise ModelError(f"{function} returns {type(model).__name__}, no torch.nn.Module")
    return model


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """Build a model of torchvision without weights; quantizable ones in float."""
    from torchvision.models import get_model_builder

    builder = get_model_builder(name)
    takes = inspect.signature(builder).parameters
    blank = {key: None for key in ("weights", "weights_backbone") if key in takes}
    fixed: dict[str, Any] = {"quantize": False} if "quantize" in takes else {}
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        fixed["init_weights"] = False  # their own default warns
    model: nn.Module = builder(**{**blank, **fixed, **options})
    return model


def _torchvision(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    from torchvision.models import list_models

    if name not in list_models():
        raise ModelError(f"torchvision has no model {name!r}; {did_you_mean(name, list_models())}")
    classes = options.get("num_classes")
    if options.get("in_chans", 3) != 3:
        raise ModelError("torchvision's models take 3 channels: pass --channels 3")
    if not pretrained:
        return torchvision_model(name, **({"num_classes": classes} if classes else {}))
    model = torchvision_model(name, weights="DEFAULT")
    if classes:
        heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        head_name, head = heads[-1]
        parent, _, leaf = head_name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Linear(head.in_features, classes))
    return model


def _by_name(
    name: str, classes: Sequence[str], options: dict[str, Any], pretrained: bool, extra: Any
) -> nn.Module:
    import timm
    from transformers import CONFIG_MAPPING

    is_timm = timm.is_model(name.partition(".")[0]) or name.startswith(("hf-hub:", "local-dir:"))
    if is_timm:
        return _timm(name, options, pretrained, extra)
    if name in CONFIG_MAPPING:
        return _hugging_face(name, classes, options, False)
    if "/" not in name:
        known = [*OWN, *timm.list_models(), *CONFIG_MAPPING]
        raise ModelError(f"there is no model {name!r}; {did_you_mean(name, known)}")
    if name.startswith((".", "~", "/")):
        raise ModelError(f"there is no folder {name}")
    try:
        if name.startswith("timm/"):
            return _timm(f"hf-hub:{name}", options, pretrained, extra)
        return _hugging_face(name, classes, options, pretrained)
    except (OSError, ConnectionError) as error:
        raise ModelError(
            f"{name!r} is no folder here, and the hub did not give it: no network, no such model, "
            "or one that asks for a login; download it (hf download) and pass its folder"
        ) from error


def _timm(name: str, options: dict[str, Any], pretrained: bool, extra: Any) -> nn.Module:
    import timm

    def create(**more: Any) -> nn.Module:
        try:
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **more, **extra)
        except (OSError, ConnectionError, RuntimeError) as error:
            if not pretrained or "size mismatch" in str(error):
                raise
            raise ModelError(
                f"the weights of {name} could not be fetched ({type(error).__name__}: no network, "
                "or none are published); leave out --pretrained, or pass local-dir:FOLDER"
            ) from error
        return model

    clash = sorted(set(options) & set(extra))
    if clash:
        raise ModelError(f"--model-arg {clash[0]} is decided by the data: leave it out")
    try:
        return create(**options)
    except TypeError as error:
        # Most convolutional models take any size, and so have no such argument.
        if "img_size" not in str(error):
            raise
        return create(**{key: value for key, value in options.items() if key != "img_size"})


def _hugging_face(
    name: str, classes: Sequence[str], options: dict[str, Any], weights: bool
) -> nn.Module:
    """Build a model of Transformers from a folder, a config file, a hub id or a model type."""
    import transformers

    path = Path(name)
    offline = {"local_files_only": True} if path.exists() else {}
    weights = weights and not path.is_file()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: pass a folder that save_pretrained wrote")
        weights = any(path.glob("*.safetensors"))
        if not weights and any(path.glob("*.bin")):
            raise ModelError(
                f"{path.name} has its weights in .bin files, which can run code; save them as "
                "safetensors (save_pretrained does), or remove them to start anew"
            )
    try:
        config = (
            transformers.CONFIG_MAPPING[name]()
            if name in transformers.CONFIG_MAPPING
            else transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **offline)
        )
        if not classes:
            return _of_its_class(config)
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: i for i, label in enumerate(classes)}
        auto: Any = transformers.AutoModelForImageClassification
        keys = {"num_channels": options.get("in_chans")}
        keys |= {} if weights else {"image_size": options.get("img_size")}
        for key, value in keys.items():
            if value is not None and hasattr(config, key):
                if weights and getattr(config, key) != value:
                    had = getattr(config, key)
                    raise ModelError(
                        f"the weights of {path.name} are for {had} channels, the images have "
                        f"{value}: convert them by --channels {had}"
                    )
                setattr(config, key, value)
        if not weights:
            fresh: nn.Module = auto.from_config(config, trust_remote_code=False)
            return fresh
        loading = {"trust_remote_code": False, "use_safetensors": True, **offline}
        with quiet_loading():
            loaded: nn.Module = auto.from_pretrained(
                name, config=config, ignore_mismatched_sizes=True, **loading
            )
        return loaded
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{path.name} is built by code of its own (auto_map in its config.json), which is "
                "not run here: call tract_hub.enable in a script of yours"
            ) from error
        if "Unrecognized configuration class" in str(error):
            raise ModelError(f"{path.name} is no image classifier: choose another model") from error
        raise


def _of_its_class(config: Any) -> nn.Module:
    """Return a model of the class that a config names, or the base model of its kind."""
    import transformers

    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            model: nn.Module = getattr(transformers, architecture)(config)
            return model
    base: nn.Module = transformers.AutoModel.from_config(config, trust_remote_code=False)
    return base
