"""Every model type of Transformers that takes images or video, built without a download."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tract_hub.locator.zoos.huggingface import takes_pixels

_SQUARE_490 = {"image_size": 490, "patch_size": 14}
_SQUARE_896 = {"vision_config": {"image_size": 896, "patch_size": 14}}
_SQUARE_512 = {"vision_config": {"image_size": 512, "patch_size": 16}}

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

_REPVIT = {
    "model_type": "timm_wrapper",
    "architecture": "repvit_m1",
    "num_classes": 1000,
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
}

LACKING: dict[str, dict[str, Any]] = {
    "aria": {"vision_config": {"model_type": "idefics3_vision", **_SQUARE_490}},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "blip-2": {"image_token_index": 1},
    "chameleon": {"vocabulary_map": {"<image>": 1, "IMGIMGAZ": 2}},
    "colmodernvbert": {"vlm_config": {"model_type": "modernvbert", **_SQUARE_512}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
    },
    "llama4": {"vision_config": {"hidden_size": 1408}},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 2048,
            "indexer_compress_ratio": 32,
        }
    },
    "t5gemma2": {"encoder": _SQUARE_896},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense"] * 12, "num_hidden_layers": 12},
        "vision_config": {
            "encoder_config": {
                "hidden_size": 896,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
            }
        },
    },
    "edgetam": {"vision_config": {"backbone_config": _REPVIT}},
    "edgetam_video": {"vision_config": {"backbone_config": _REPVIT}},
    "edgetam_vision_model": {"backbone_config": _REPVIT},
    "embedding_gemma2": {"vision_config": {}},
    "emu3": {"vocabulary_map": {"<image>": 1, "<|extra_200|>": 2, "<|visual token 000003|>": 3}},
    "gemma3": _SQUARE_896,
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "4/8",
        "vision_feature_select_strategy": "full",
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16},
    },
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "idefics3": _SQUARE_512,
    "instructblip": {"image_token_index": 1},
    "instructblipvideo": {"video_token_index": 1},
    "modernvbert": _SQUARE_512,
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 1024, "global_pool": ""},
        }
    },
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 25, "class_order": list(range(25))},
    "pp_ocrv6_small_det": {
        "backbone_config": {
            "model_type": "pp_lcnet_v3",
            "scale": 0.75,
            "out_features": ["stage2", "stage3", "stage4", "stage5"],
        },
        "layer_list_out_channels": [48, 96, 192, 384],
    },
    "rf_detr": {"backbone_config": {"model_type": "rf_detr_dinov2", "image_size": 448}},
    "shieldgemma2": _SQUARE_896,
    "smolvlm": _SQUARE_512,
    "timm_backbone": {"backbone": "resnet18"},
    "ultravbert": _SQUARE_512,
    "uvdoc": {
        "backbone_config": {"model_type": "uvdoc_backbone", "out_indices": [1, 2, 3, 4, 5, 6]}
    },
    "vitmatte": {
        "backbone_config": {
            "model_type": "vitdet",
            "num_channels": 4,
            "hidden_size": 384,
            "num_attention_heads": 6,
        },
        "fusion_hidden_sizes": [256, 128, 64, 32],
    },
}
"""Model type → settings without which its default config describes no working model."""

Builder = Callable[[], nn.Module]


def models() -> Iterator[tuple[str, Builder]]:
    """Yield the name of each model type that takes pixels, and what builds its first such class."""
    for model_type, names in _auto_classes().items():
        for name in names:
            cls = _class_named(name)
            if cls is not None and takes_pixels(cls):
                yield f"{model_type}/{name}", partial(build, cls)
                break


def build(cls: Any) -> nn.Module:
    """Build a model with its class's default config; its parameters take no memory."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():  # buffers keep their values, as in a model in use
            model: nn.Module = cls(_config(cls))
    except RuntimeError:  # a single parameter too large to be allocated even once
        with torch.device("meta"):
            model = cls(_config(cls))
    return model.eval()


def _auto_classes() -> dict[str, list[str]]:
    """Model type → the names of its classes, the base model first."""
    from transformers.models.auto import modeling_auto

    found: dict[str, dict[str, None]] = {}
    for mapping, table in vars(modeling_auto).items():
        if not (mapping.startswith("MODEL_") and mapping.endswith("MAPPING_NAMES")):
            continue
        for model_type, names in table.items():
            names = names if isinstance(names, (tuple, list)) else (names,)
            found.setdefault(model_type, {}).update(dict.fromkeys(names))
    return {model_type: list(names) for model_type, names in found.items()}


def _class_named(name: str) -> Any:
    """A class of Transformers; None where a library that it needs is not installed."""
    import transformers

    cls = getattr(transformers, name, None)
    try:
        return cls if inspect.isfunction(getattr(cls, "forward", None)) else None
    except ImportError:
        return None


def _config(cls: Any) -> Any:
    """The default config of a class, with what it lacks to build or to run."""
    kind = cls.config_class.model_type
    if kind == "vision-encoder-decoder":
        return _pair(cls.config_class)
    return cls.config_class(**LACKING.get(kind, {}))


def _pair(config_class: Any) -> Any:
    from transformers import CONFIG_MAPPING

    vision, text = CONFIG_MAPPING["vit"](), CONFIG_MAPPING["gpt2"]()
    return config_class.from_encoder_decoder_configs(vision, text)
