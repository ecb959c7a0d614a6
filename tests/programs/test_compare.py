"""Runs side by side: what differs, how they went, what they draw; Markdown, images and a page."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import tiny
from PIL import Image

from ig_jax import modes
from ig_jax.errors import UserError
from ig_jax.plots import run_curves


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The tiny run, twice: the second is said to have had other settings, losses and results."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("plain", "other|<b>"):
        tiny.trained().copy(root / name)
    other = root / "other|<b>"
    record = json.loads((other / "config.json").read_text())
    record["config"]["optim"]["learning_rate"] = 0.25
    record["config"]["objective"]["terms"]["sra2"] = {"weight": 1.0}
    (other / "config.json").write_text(json.dumps(record))
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"loss": 2 * line["loss"], "eval/fd": 3.0}
    (other / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    folder = other / "evaluations" / "one"
    folder.mkdir(parents=True)
    measures = {"fd": {"mean": 1.25, "std": 0.5}, "precision": {"mean": 0.5, "std": 0.0}}
    record = {"measures": measures, "of": "20 samples of step 24"}
    (folder / "results.json").write_text(json.dumps(record))
    (other / "evaluations" / "cut").mkdir()
    (other / "evaluations" / "cut" / "results.json").write_text('{"measures"')
    return root / "plain", other


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    target = tmp_path_factory.mktemp("compared")
    modes.compare_runs(",".join(map(str, runs)), target)
    return target


def test_only_what_differs_is_listed(compared):
    text = (compared / "compare.md").read_text()
    settings = text.split("## Settings that differ")[1].split("##")[0]
    rows = [
        [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in settings.split("\n")
    ]
    assert [row for row in rows if row][2:] == [
        ["objective.terms.sra2.weight", "-", "1"],
        ["optim.learning_rate", "0.003", "0.25"],
    ]
    assert rows[2] == ["field", "plain", r"other\|<b>"]


def test_losses_and_evaluations_stand_in_tables(compared):
    text = (compared / "compare.md").read_text()
    losses = text.split("## Last losses")[1].split("##")[0]
    plain, other = (line.split("|") for line in losses.split("\n") if "24" in line)
    assert float(other[3 + 1]) == pytest.approx(2 * float(plain[3]), rel=1e-3)
    evaluations = text.split("## Evaluations")[1]
    assert "1.25 ± 0.50" in evaluations and "20 samples of step 24" in evaluations
    assert evaluations.count("other") == 1  # the one that was cut off is none


def test_samples_are_of_the_same_noise(compared):
    """The same network twice: two panels alike."""
    with Image.open(compared / "samples.png") as image:
        pixels = np.asarray(image)
    width = (pixels.shape[1] - 3 * 16) // 2
    left, right = pixels[30:, 16 : 16 + width], pixels[30:, 32 + width : 32 + 2 * width]
    np.testing.assert_array_equal(left, right)
    assert left.std() > 10


def test_the_page_needs_no_other_file_and_is_whole(compared):
    page = (compared / "compare.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(x) for x in images] == [
        (compared / name).read_bytes() for name in ("curves.png", "samples.png")
    ]
    assert "<b>" not in page and "other|&lt;b&gt;" in page and "color-scheme: light dark" in page
    assert page.count("<table>") == 3 and not re.search(r'(src|href)="(?!data:)', page)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_shows_the_page_light_and_dark(compared, tmp_path):
    shades = {}
    for name, setting in (("light", "1"), ("dark", "0")):
        flags = (
            f"--headless --no-sandbox --disable-gpu --window-size=1000,1500 --screenshot={name}.png"
        )
        theme = f"--blink-settings=preferredColorScheme={setting}"
        page = (compared / "compare.html").as_uri()
        subprocess.run([BROWSER, *flags.split(), theme, page], cwd=tmp_path, check=True)
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L")).astype(float)
        shades[name] = np.median(pixels)
        bands = pixels[:1200].reshape(6, -1)
        assert (bands.std(axis=1) > 5).all()  # tables, curves and samples all the way down
    assert shades["light"] > 230 and shades["dark"] < 40


@pytest.mark.slow
def test_a_run_without_a_checkpoint_is_compared_all_the_same(runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((runs[0] / "config.json").read_text())
    modes.compare_runs(f"{bare}, {runs[0]}", tmp_path / "to")
    text = (tmp_path / "to" / "compare.md").read_text()
    assert "No samples of bare: " in text and "![Samples](samples.png)" in text
    assert "## Settings that differ\n\nNone." in text and "## Evaluations\n\nNone." in text


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("{0}", "name 2 to 20 workdirs"),
        ("{0},{0}", "name 2 to 20 workdirs"),
        ("{0},{0}/", "name 2 to 20 workdirs"),
        ("{0},{0}/checkpoints", "checkpoints: holds no config.json of a run"),
        ("{0},{0}/../plain", "in several ways; name every workdir once"),
        ("{0},s3://bucket/run", "--runs = 's3://bucket/run'"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, tmp_path, given, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        modes.compare_runs(given.format(runs[0]), tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_smoothing_is_a_mean_over_a_window_that_ends_cut():
    np.testing.assert_allclose(run_curves.smoothed([3.0, 1.0, 8.0]), [3.0, 4.0, 8.0])
    values = np.random.default_rng(0).normal(size=200)
    found = run_curves.smoothed(values.tolist())
    np.testing.assert_allclose(
        found[[0, 2, 100]], [values[0], values[:5].mean(), values[95:106].mean()]
    )
    np.testing.assert_allclose(run_curves.smoothed(list(range(50))), np.arange(50.0))
