"""First layers of Transformers models: one model of each distinct stem, and those without."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import tract_hub
from tract_hub.studies.zoos.huggingface import build

PATCHES = "embeddings.patch_embeddings.projection.weight"

STEMS: dict[str, dict[str, int]] = {
    "ViTModel": {PATCHES: 768},
    "BeitModel": {PATCHES: 768},
    "Dinov2Model": {PATCHES: 588},
    "SwinModel": {PATCHES: 48},
    "Swin2SRForImageSuperResolution": {"swin2sr.first_convolution.weight": 27},
    "ConvNextModel": {"embeddings.patch_embeddings.weight": 48},
    "ResNetModel": {"embedder.embedder.convolution.weight": 147},
    "BitModel": {"embedder.convolution.weight": 147},
    "LevitModel": {"patch_embeddings.embedding_layer_1.convolution.weight": 27},
    "VideoMAEModel": {PATCHES: 1536},
    "CLIPModel": {"vision_model.embeddings.patch_embedding.weight": 3072},
    "Siglip2Model": {"vision_model.embeddings.patch_embedding.weight": 768},
    "Qwen2_5_VLModel": {"visual.patch_embed.proj.weight": 1176},
    "Pix2StructForConditionalGeneration": {"encoder.embeddings.patch_projection.weight": 768},
    "LlavaModel": {"vision_tower.embeddings.patch_embedding.weight": 588},
    "VideoLlavaModel": {
        "image_tower.embeddings.patch_embedding.weight": 588,
        "video_tower.embeddings.patch_embedding.weight": 588,
    },
    "DetrModel": {"backbone.model.conv1.weight": 147},
    "DepthProModel": {
        "encoder.image_encoder.model.embeddings.patch_embeddings.projection.weight": 588,
        "encoder.patch_encoder.model.embeddings.patch_embeddings.projection.weight": 588,
    },
    "DeepseekVLHybridModel": {
        "high_res_vision_model.vision_encoder.patch_embed.projection.weight": 768,
        "vision_model.embeddings.patch_embedding.weight": 768,
    },
    "FuyuModel": {"vision_embed_tokens.weight": 2700},
    "SegGptModel": {PATCHES: 768},
    "ChameleonModel": {"vqmodel.encoder.conv_in.weight": 27},
    "FlavaModel": {"image_model." + PATCHES: 768},
    "FlavaForPreTraining": {
        "flava.image_model." + PATCHES: 768,
        "image_codebook.blocks.input.weight": 147,
    },
    "VitMatteForImageMatting": {
        "backbone.embeddings.projection.weight": 1024,
        "decoder.convstream.convs.0.conv.weight": 36,
    },
    "PerceiverForImageClassificationLearned": {
        "perceiver.input_preprocessor.convnet_1x1.weight": 3
    },
    "TimmWrapperModel": {"timm_model.conv1.weight": 147},
    "TimmBackbone": {"_backbone.conv1.weight": 147},
    "ASTModel": {PATCHES: 256},
    "Inkling2VisionModel": {"embeddings.patch_embedding.weight": 1200},
    "InklingModel": {"vision_tower.encoder_layers.0.projection.weight": 3},
    "Molmo2Model": {"vision_tower.patch_embedding.weight": 588},
    "PI0Model": {"vlm.vision_tower.embeddings.patch_embedding.weight": 588},
    "GraniteDoclingModel": {"vision_model.embeddings.patch_embedding.weight": 768},
    "UnlimitedOcrModel": {"vision_tower.sam_encoder.patch_embed.projection.weight": 768},
    "PeAudioVideoEncoder": {
        "embedder.video_encoder.embedder.vision_model.timm_model.patch_embed.proj.weight": 588
    },
}
"""Class → name of each first layer's weight and the features n of its input."""


@pytest.mark.parametrize("name", STEMS)
def test_first_layers(name: str) -> None:
    if not hasattr(transformers, name) and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("newer than this version of Transformers")
    if name == "FuyuModel" and transformers.__version__.startswith("5.17"):
        pytest.skip("it takes as many tokens as patches: example_inputs have to be passed")
    stems = tract_hub.locate(build(getattr(transformers, name)))
    assert {stem.weight_name: stem.in_features for stem in stems} == STEMS[name]


def test_pixels_behind_a_trained_norm_are_noted() -> None:
    (stem,) = tract_hub.locate(build(transformers.TvpModel))
    assert any("visual_prompter.pad_up" in note for note in stem.notes)


def test_a_part_that_is_followed_alone_is_named() -> None:
    (stem,) = tract_hub.locate(build(transformers.LlavaModel))
    assert stem.reason.endswith("followed in get_image_features alone")
    model = build(transformers.VisionEncoderDecoderModel)
    assert "alone" not in tract_hub.locate(model)[0].reason
    model.decoder.lm_head = nn.Linear(3, 3)  # no text can pass
    (stem,) = tract_hub.locate(model)
    assert stem.weight_name == "encoder." + PATCHES
    assert stem.reason.endswith("followed in encoder alone")


class NeedsAPlan(transformers.PreTrainedModel):
    """A model whose forward nobody can guess; Transformers' interface names its embeddings."""

    config_class = transformers.ViTConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.embeddings = transformers.ViTModel(config).embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, pixel_values, plan):
        return self.embeddings(pixel_values)[plan.steps]


def test_where_no_forward_can_be_guessed_the_embeddings_are_followed() -> None:
    (stem,) = tract_hub.locate(NeedsAPlan(transformers.ViTConfig(num_hidden_layers=1)))
    assert stem.weight_name == PATCHES
    assert stem.reason.endswith("followed in embeddings alone")


@pytest.mark.parametrize("settings", [{}, {"backbone_config": {"model_type": "rf_detr_dinov2"}}])
def test_a_default_size_that_does_not_fit_the_windows(settings) -> None:
    config = transformers.RfDetrConfig(**settings)
    with torch.device("meta"):
        model = transformers.RfDetrModel(config)
    (stem,) = tract_hub.locate(model)
    assert "projection.weight" in stem.weight_name


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "T5Model"])
def test_a_model_of_text_takes_no_pixels(name: str) -> None:
    with pytest.raises(tract_hub.TractError, match=rf"{name} takes no pixels.*input_ids"):
        tract_hub.locate(build(getattr(transformers, name)))


def test_pixels_as_an_index_are_refused() -> None:
    with pytest.raises(tract_hub.TractError, match=r"ImageGPTModel takes no pixels.*input_ids"):
        tract_hub.locate(build(transformers.ImageGPTModel))


def test_a_model_that_has_run_before_keeps_what_collects_its_features() -> None:
    model = build(transformers.LlavaModel)
    first = tract_hub.locate(model)
    assert tract_hub.locate(model) == first


def test_half_precision_and_the_environment_stay() -> None:
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig()).half()
    before = dict(os.environ)
    (stem,) = tract_hub.locate(model)
    assert stem.module.weight.dtype == torch.float16
    assert dict(os.environ) == before
