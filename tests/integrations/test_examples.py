"""Each example runs as it stands, with TrAct on its first layer."""

from __future__ import annotations

import logging
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "timm_train": "timm",
    "hf_trainer": "transformers",
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
}


def test_every_example_is_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_learns_the_digits_with_tract(
    name: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    with caplog.at_level(logging.INFO, "tract_hub"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert [record for record in caplog.records if record.getMessage().startswith("TrAct λ=0.1 on")]
    losses = [float(loss) for loss in re.findall(r"loss\W+([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 0.3  # chance is log(10) = 2.3
