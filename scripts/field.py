"""Run the tests of situations from other libraries, and write their table to docs/field.md.

Install what should be tried first: opacus, lightning, fastai, monai, ultralytics,
segmentation-models-pytorch, lightly, peft, torchvision. What is not there is skipped, and the table
says so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd

from tract_hub.studies import table
from tract_hub.studies.machine import versions

ROOT = Path(__file__).parent.parent
TESTS = ("test_libraries", "test_field", "test_changes", "test_rebuilt")
PACKAGES = (
    "torch torchvision timm transformers accelerate peft opacus lightning fastai monai ultralytics "
    "segmentation-models-pytorch lightly"
).split()
HEAD = """# Situations from the field

Each is a test with an oracle of its own: the ordinary gradient times the inverse of the Gram
matrix, in float64, of the input that the layer truly had. `scripts/field.py` writes this table.

An optimizer that reads something else than `.grad` goes past TrAct. Opacus' does, in each of its
modes (`grad_sample`, expanded weights, ghost clipping), and is refused.
"""


def main() -> int:
    """Run the tests; return their exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/{name}.py" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    found = versions(PACKAGES)
    packages = [(name, found.get(name, "not installed")) for name in PACKAGES]
    rows = []
    for case in cases:
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        outcome = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        # A library's test is told by its library, any other by its own sentence.
        name, _, library = case.get("name", "").removesuffix("]").partition("[")
        situation = name.removeprefix("test_").replace("_", " ")
        rows.append((library if name == "test_a_library" else situation, outcome))
    situations = pd.DataFrame(rows, columns=["situation", "outcome"])
    counts = situations.groupby("situation", sort=False)["outcome"].value_counts().unstack()
    counts = counts.reindex(columns=["passed", "skipped", "failed"]).fillna(0).astype(int)
    text = table.markdown(pd.DataFrame(packages, columns=["package", "version"]))
    text = f"{HEAD}\n{text}\n{table.markdown(counts.reset_index())}"
    (ROOT / "docs" / "field.md").write_text(text, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
