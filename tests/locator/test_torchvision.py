"""First layers of torchvision models, of every kind of input."""

import warnings

import pytest
import torch

import tract_hub
from tract_hub.studies.models import build_model, build_without_weights

EXPECTED = {
    "convnext_tiny": ["features.0.0"],
    "googlenet": ["conv1.conv"],
    "inception_v3": ["Conv2d_1a_3x3.conv"],
    "resnet18": ["conv1"],
    "vit_b_16": ["conv_proj"],
    "swin_t": ["features.0.0"],
    "quantized_resnet18": ["conv1"],
    "deeplabv3_mobilenet_v3_large": ["backbone.0.0"],
    "lraspp_mobilenet_v3_large": ["backbone.0.0"],
    "fasterrcnn_resnet50_fpn": ["backbone.body.conv1"],
    "fcos_resnet50_fpn": ["backbone.body.conv1"],
    "maskrcnn_resnet50_fpn": ["backbone.body.conv1"],
    "keypointrcnn_resnet50_fpn": ["backbone.body.conv1"],
    "retinanet_resnet50_fpn": ["backbone.body.conv1"],
    "ssd300_vgg16": ["backbone.features.0"],
    "r3d_18": ["stem.0"],
    "s3d": ["features.0.0.0"],
    "mvit_v2_s": ["conv_proj"],
    "swin3d_t": ["patch_embed.proj"],
    "raft_small": ["context_encoder.convnormrelu.0", "feature_encoder.convnormrelu.0"],
}


def found(model):
    return [stem.weight_name.removesuffix(".weight") for stem in tract_hub.locate(model)]


@pytest.mark.parametrize("name", EXPECTED)
def test_first_layers(name) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_without_weights(lambda: build_model(f"torchvision:{name}"))
    assert found(model) == EXPECTED[name]


def test_detector_with_a_backbone_for_one_channel() -> None:
    from torchvision.models import resnet18
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    with torch.device("meta"):
        backbone = resnet18()
        backbone.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3)
        detector = FasterRCNN(
            _resnet_fpn_extractor(backbone, 3), 2, image_mean=[0.5], image_std=[0.2]
        )
    (stem,) = tract_hub.locate(detector)
    assert stem.weight_name == "backbone.body.conv1.weight"
    assert stem.path[:2] == ("sub", "div")  # normalised, then resized
