"""A model's folder is data: the code in it is never run, nor is anybody asked whether it may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tract_hub.errors import TractError
from tract_hub.studies.models.huggingface import huggingface_builder
from tract_hub.studies.models.named import model_named


@pytest.mark.parametrize(
    "build",
    [lambda path: model_named(str(path)), lambda path: huggingface_builder(path, 3, ("a",))],
)
def test_code_in_a_models_folder_is_not_run(build, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what Transformers would ask for
    marker = tmp_path / "ran"
    code = (
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import PretrainedConfig\n"
        "class Config(PretrainedConfig):\n    model_type = 'strange'\n"
    )
    (tmp_path / "configuration_strange.py").write_text(code, encoding="utf-8")
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "configuration_strange.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TractError, match=r"config"):
        build(tmp_path)
    assert not marker.exists()
