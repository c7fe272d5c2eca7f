"""``report.html``: one file, nothing beside it, nothing of the user's taken for markup."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.studies.comparisons import ONE_SEED, TINY, compare, record
from tract_hub.studies.compare import run as compare_module
from tract_hub.studies.compare.aggregate import compare_runs
from tract_hub.studies.compare.records import ORDINARY, Arm, Filters
from tract_hub.studies.compare.report import contributions
from tract_hub.studies.compare.report.filters import strip_pixels
from tract_hub.studies.compare.report.page import Report, render
from tract_hub.studies.compare.tables import Cells, accuracy_table, gain_table

ARMS = (ORDINARY, Arm(0.05), Arm(0.1))
HOSTILE = """<script>alert("1")</script>'&<img src=x onerror=alert(1)>"""
REFERENCES = {"src", "href", "xlink:href", "data", "srcset", "action", "poster", "background"}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart; every element must be closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def measured(arms=ARMS, stem: str = "conv1.weight") -> dict[str, object]:
    images = 8
    return {
        "arms": [str(arm) for arm in arms],
        "seed": 0,
        "stem": stem,
        "batch": 4,
        "brightness": [i / images for i in range(images)],
        "contrast": [i / images for i in range(images)],
        "norms": {str(arm): [1.0 + i for i in range(images)] for arm in arms},
        "residual": 1e-6,
    }


def report(runs, **changes) -> Report:
    arms = list(dict.fromkeys(str(run.arm) for run in runs))
    ones, quartiles = dict.fromkeys(arms, 1.0), {arm: [1.0, 1.0] for arm in arms}
    times = {"seconds": ones, "overhead": ones, "overhead_quartiles": quartiles}
    comparison = compare_runs(runs, times)
    made = Report(
        title="a model on some data",
        command="tract-hub compare",
        facts=Cells("What was compared", ("setting", "value"), (("model", "resnet18"),)),
        accuracy=accuracy_table(comparison),
        gain=gain_table(comparison),
        comparison=comparison,
        runs=runs,
        classes=10,
        contributions=measured(),
        versions={"torch": "2.11"},
    )
    return replace(made, **changes)


def trained(arms=ARMS, seeds=(0, 1), **changes):
    return [record(arm, seed, [0.2, 0.5 + seed / 10], **changes) for arm in arms for seed in seeds]


def svg_parts(text: str, start: str) -> str:
    """Return the drawing whose description starts so."""
    return next(part for part in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if start in part)


def test_the_page_is_whole_and_refers_to_nothing_outside():
    text = render(report(trained()))
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert page.open == []
    assert not page.all("script")
    assert not page.all("link")
    addresses = [
        value for _, attributes in page.tags for name, value in attributes.items()
        if name in REFERENCES
    ]  # fmt: skip
    assert len(addresses) > 10
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert "://" not in text
    assert "@import" not in text
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", text))
    policy = page.all("meta")[-1]
    assert policy["content"].startswith("default-src 'none'")


def test_ids_are_there_once_and_every_reference_has_its_own():
    page = Page(render(report(trained())))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {a["xlink:href"][1:] for a in page.all("use")}
    assert used
    assert used <= set(ids)


def test_every_arm_has_a_line_a_band_a_strip_and_a_share():
    text = render(report(trained()))
    page = Page(text)
    assert len(page.all("img")) == len(ARMS)
    for title in ("Test accuracy", "Test loss", "Training loss", "ordinary: darkest quarter"):
        drawing = svg_parts(text, f'aria-label="{title}')
        for i, arm in enumerate(ARMS):
            assert f"stroke: var(--arm-{i})" in drawing
            assert str(arm) in drawing
            if title.startswith("T"):
                assert re.search(rf"fill: var\(--arm-{i}\); fill-opacity", drawing), "no band"
    for i, arm in enumerate(ARMS):
        assert f"{arm} (mean ± sd, 2 seeds)" in page.text
        assert text.count(f"--arm-{i}:") == 2, "a colour for light and one for dark"
        assert any(str(arm) in image["alt"] for image in page.all("img"))


def test_no_colour_is_left_that_the_style_sheet_does_not_set():
    text = render(report(trained()))
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings)


def test_what_the_user_named_is_text():
    kept = Filters(HOSTILE, (0,), (0, 2), [[[0.0]], [[1.0]]])
    runs = [replace(each, filters=kept) for each in trained()]
    given = {
        "title": HOSTILE,
        "command": HOSTILE,
        "facts": Cells(HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),)),
        "contributions": measured(stem=HOSTILE),
        "versions": {HOSTILE: HOSTILE},
    }
    for changes in (given, {**given, "contributions": HOSTILE}):
        page = Page(render(report(runs, **changes)))
        assert page.open == []
        assert not page.all("script")
        assert len(page.all("img")) == len(ARMS)
        assert not any(name.startswith("on") for _, a in page.tags for name in a)
        assert page.text.count(HOSTILE) >= 10


def test_one_seed_has_no_spread():
    text = render(report(trained(seeds=(3,))))
    assert "ordinary (1 seed)" in text
    assert "ordinary, seed 3" in text


@pytest.mark.parametrize("diverged", [ARMS, ARMS[2:]])
def test_an_arm_that_diverged_is_said_to_have(diverged):
    lost = [record(arm, 0, [0.1], diverged_at=1) for arm in diverged]
    runs = [*trained([arm for arm in ARMS if arm not in diverged], (0,)), *lost]
    page = Page(render(report(runs)))
    assert page.text.count("Every run diverged") == len(diverged)
    assert len(page.all("img")) == len(ARMS) - len(diverged)
    assert page.text.count("(diverged)") == len(diverged)


def test_a_measurement_that_could_not_be_made_says_why():
    assert "Not shown: no way." in render(report(trained(), contributions="no way"))
    zero = measured() | {"norms": {str(arm): [0.0] * 8 for arm in ARMS}}
    assert "gradient is zero or not finite" in render(report(trained(), contributions=zero))


@pytest.mark.parametrize(
    ("shape", "pixels"),
    [
        ((3, 4, 4), (4, 4)),  # RGB
        ((1, 16, 16), (16, 16)),  # grey
        ((5, 3, 3), (3, 15)),  # five channels, side by side
        ((48,), (4, 4)),  # a Linear on RGB patches
        ((7,), (1, 7)),
    ],
)
def test_a_strip_has_a_line_a_snapshot_and_a_column_a_filter(shape, pixels):
    values = np.random.default_rng(0).normal(size=(3, 2, *shape)).tolist()
    found = strip_pixels(Filters("w", (0, 5), (0, 1, 2), values))
    scale = -(-16 // pixels[0])
    gap = max(1, pixels[0] * scale // 8)
    assert found.shape == (3 * (pixels[0] * scale + gap), 2 * (pixels[1] * scale + gap), 4)
    opaque = found[..., 3] == 255
    assert opaque.sum() == 3 * 2 * pixels[0] * pixels[1] * scale**2
    assert (found[..., 3][~opaque] == 0).all()


def test_a_filter_that_is_no_number_leaves_a_hole():
    found = strip_pixels(Filters("w", (0,), (0, 1), [[[[[1.0]]]], [[[[None]]]]]))
    assert found[0, 0].tolist() == [255, 255, 255, 255]
    assert found[-3, 0].tolist() == [0, 0, 0, 0]


def test_a_finished_comparison_is_only_rendered(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert compare(*TINY, *ONE_SEED, "--out", str(out)) == 0
    assert not (out / "report.html").exists()
    monkeypatch.setattr(compare_module, "train_run", None)
    assert compare(*TINY, *ONE_SEED, "--report", "--out", str(out)) == 0
    assert "report.html" in capsys.readouterr().out
    first = (out / "report.html").read_bytes()
    monkeypatch.setattr(contributions, "measure_contributions", None)
    (out / "report.html").write_text("an older one")
    # A report that is there is kept up to date.
    assert compare(*TINY, *ONE_SEED, "--out", str(out)) == 0
    assert (out / "report.html").read_bytes() == first
    page = Page(first.decode())
    image = page.all("img")[0]["src"].partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(image))) as strip:
        assert strip.mode == "RGBA"
    assert "patch_embed.proj.weight" in page.text
    assert "--max-train 128" in page.text
    assert str(tmp_path) not in first.decode()
    assert not list(out.rglob("*.part"))


def test_another_arm_is_measured_anew(tmp_path):
    out = tmp_path / "out"
    assert compare(*TINY, *ONE_SEED, "--report", "--out", str(out)) == 0
    assert compare(*TINY, *ONE_SEED, "--lam", "0.1,0.3", "--out", str(out)) == 0
    page = Page((out / "report.html").read_text())
    assert page.text.count("TrAct λ=0.3") > 5
    assert len(page.all("img")) == 3
