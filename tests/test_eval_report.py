"""The report is one page that asks nothing of the network; curves and their reading; an evaluation from end to end."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from eval_tiny import write_samples, write_tiny_clip
from PIL import Image
from rich.console import Console
from tiny import write_tiny_model

from diffalign.errors import UserError
from diffalign.eval.curves import panels, read_log, series
from diffalign.eval.evaluate import Sampling, evaluate, parse_model, parse_models, write_report_of
from diffalign.eval.page import Sheet
from diffalign.eval.plots import Curve, curves_svg, gains_svg, log_ticks, ticks
from diffalign.eval.report import ReportData, headline, render_report, write_report, write_run_report
from diffalign.eval.score import score_images
from diffalign.eval.study import study
from diffalign.eval.training_report import Training

PROMPTS = ["a red circle", "a <b>bold</b> & 'quoted' prompt", "two", "three", "four"]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects every address of a page and checks that its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.open == []
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.findall(r"url\((?!#)|@import|@font-face", text)
    return page


def log_rows(
    steps: int = 40, accuracy: float = 0.7, gain: float = 0.002, saturated: float = 0.0
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for step in range(0, steps * 10, 10):
        x = step / (steps * 10)
        values = {"loss": 0.69 - 0.1 * x, "accuracy": 0.5 + (accuracy - 0.5) * x, "margin": 0.01 * x}
        values |= {"chosen_error": 0.1 - gain * x, "rejected_error": 0.1, "chosen_gain": gain * x}
        values |= {"logit": x, "logit_abs": x, "saturated": saturated, "lr": 1e-4}
        values |= {"grad_norm/student": 1.0 + x, "my_own_number": x}
        rows.append({"step": step, "kind": "train", "time": 1.0, **values})
        if step % 100 == 0:
            rows.append({"step": step, "kind": "validate", "time": 1.0, **values, "brightness": 0.5, "saturation": 0.4})
    return rows


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sides")
    clip = write_tiny_clip(folder / "clip")
    for name, salt in (("base", 0), ("tuned", 1)):
        write_samples(folder / name, PROMPTS, per_prompt=2, salt=salt)
        scores = folder / name / "scores.jsonl"
        score_images(folder / name, None, [f"clip={clip}", f"pickscore={clip}"], scores, device="cpu", progress=False)
    return folder / "tuned", folder / "base"


def test_a_comparison_page(sides: tuple[Path, Path]) -> None:
    found = study(sides[::-1], in_loop=["clip"])
    text = render_report(ReportData("Base & tuned", studies=[found], training=Training(log=log_rows())))
    page = check_self_contained(text)
    rate = found.comparisons[0].scorers[1].overall.win_rate
    assert f"{100 * rate:.1f}<small>" in text  # the first scorer was used in training, so the second speaks
    assert "in-loop" in text and found.prompts_sha256[:16] in text and "steps 20" in text
    assert "a &lt;b&gt;bold&lt;/b&gt;" in text and "<b>bold" not in text and "Base &amp; tuned" in text
    pixels = [a for a in page.addresses if a.startswith("data:image/png")]
    extremes = 2 * sum(
        min(6, sum(sign * p.gain > 0 for p in found.comparisons[0].scorers[1].pairs)) for sign in (1, -1)
    )
    assert len(pixels) == 2 * 10 + extremes
    assert text.count("<svg") == 4 + len(panels(log_rows()))
    again = render_report(ReportData("Base & tuned", studies=[found], primary="clip"))
    assert f"{100 * found.comparisons[0].scorers[0].overall.win_rate:.1f}<small>" in again
    with pytest.raises(UserError, match="primary scorer 'oracle'"):
        headline(found.comparisons[0], "oracle")


def test_figures_are_svg_with_css_colours() -> None:
    drawn = panels(log_rows())
    for svg in drawn:
        ET.fromstring(svg)
        assert "var(--a)" in svg and not re.search(r"#[0-9a-fA-F]{3}", svg) and " id=" not in svg
        numbers = [float(x) for x in re.findall(r"[-\d.]+", " ".join(re.findall(r'points="([^"]+)"', svg)))]
        assert numbers and all(0 <= x <= 400 for x in numbers)
    assert drawn == panels(log_rows())
    text = "".join(drawn)
    assert "my own number" in text and "held out" in text and "Gradient norm" in text and "student" not in drawn[0]


def test_a_number_at_many_times_is_one_figure() -> None:
    times = (999, 749, 499, 249)
    rows = [
        {"step": step, "kind": "train", **{f"kept_t{t}": i / 4 for i, t in enumerate(times)}, "latent_std/799": 0.5}
        | {"latent_std/399": 0.7, "alone_t5": 1.0}
        for step in (5, 10, 15)
    ]
    drawn = panels(rows)
    titles = [ET.fromstring(svg).get("aria-label") for svg in drawn]
    assert titles == ["alone t5", "kept, by time", "latent std, by time"]
    heat = drawn[1]
    names = re.findall(r'text-anchor="end">t (\d+)<', heat)
    assert names == ["999", "749", "499", "249"] and "0 (light) to 0.75 (dark)" in heat
    shades = [float(v) for v in re.findall(r'fill-opacity="([.\d]+)"', heat)]
    assert len(shades) == 12 and shades[::3] == sorted(shades[::3]) and shades[0] < 0.1 < 0.9 < shades[-1]
    tops = [float(v) for v in re.findall(r'<rect x="[\d.]+" y="([\d.]+)"', heat)]
    assert tops == sorted(tops) and all(48 <= y <= 212 for y in tops)
    assert drawn[2].count("<polyline") == 2 and "t 799" in drawn[2]
    assert panels([{"step": 0, "kind": "validate", **{f"kept_t{t}": 1 for t in times}}]) == []  # before the first row
    both = [{"step": s, "kind": k, **{f"kept_t{t}": 1.0 for t in times}} for s in (1, 2) for k in ("train", "validate")]
    assert [ET.fromstring(svg).get("aria-label") for svg in panels(both)] == [
        "kept, by time",
        "kept, by time, held out",
    ]
    still = panels([{"step": s, "kind": "train", **{f"kept_t{t}": 1.0 for t in times}} for s in (1, 2)])
    assert "always 1" in still[0]


def test_axes() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1] and ticks(-0.0021, 0.0043) == [-0.002, 0, 0.002, 0.004]
    assert ticks(13, 611, 6) == [200, 400, 600] and log_ticks(0.4, 3) == [0.5, 1, 2] and log_ticks(1, 1e5)[-1] == 1e5
    line = curves_svg("t", [Curve("a", [0, 10], [1.0, 3.0])])
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in re.findall(r'points="([^"]+)"', line)[0].split())
    assert x0 < x1 and y0 > y1  # larger is higher
    for flat in ([0.0, 0.0], [5.0, 5.0]):
        ET.fromstring(curves_svg("t", [Curve("a", [0, 1], flat)], level=0.5, log=True))
    ET.fromstring(gains_svg("t", [0.0, 0.0]))
    assert "lost 1" in gains_svg("a < b", [-1.0, 2.0, 3.0, 0.0]) and "tied 1" in gains_svg("t", [0.0, 1.0])


def test_large_pictures_are_shrunk_and_absent_ones_said(sides: tuple[Path, Path], tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (800, 1700, 3), dtype=np.uint8)).save(large)
    text = render_report(ReportData("x", training=Training(sheets=[Sheet("step 0", large)])))
    assert len(text) < 1.8e6 < large.stat().st_size and "data:image/jpeg" in text
    found = study(sides[::-1])
    lost = [type(p)(**{**vars(p), "image_a": "gone.png"}) for p in found.comparisons[0].scorers[0].pairs]
    found.comparisons[0].scorers[0].pairs[:] = lost
    assert "no image" in render_report(ReportData("x", studies=[found]))


def test_nothing_to_say_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        render_report(ReportData("x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(ReportData("x", training=Training(log=log_rows())), tmp_path / "file" / "r.html")


def test_run_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        write_run_report(tmp_path)
    (tmp_path / "samples").mkdir()
    for step in range(0, 700, 100):
        Image.new("RGB", (300, 200), (step // 3, 0, 0)).save(tmp_path / "samples" / f"step-{step:06d}.png")
    text = "".join(json.dumps(row) + "\n" for row in log_rows())
    (tmp_path / "log.jsonl").write_text(text + '{"step": 400, "lo')
    (tmp_path / "recipe.yaml").write_text("name: tiny/dpo\n")
    page = write_run_report(tmp_path).read_text()
    check_self_contained(page)
    shown = re.findall(r"<figcaption>(step \d+)[^<]*</figcaption>", page)
    assert shown == ["step 0", "step 300", "step 400", "step 600"]  # 300 has the lowest held-out loss
    assert "healthy" in page and "name: tiny/dpo" in page and "390 steps" in page


def test_reading_logs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no log\.jsonl"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\nbroken\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_log(tmp_path)
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3}, {"step": 4, "loss": 1}]
    assert series(rows, "loss") == ([1, 4], [2, 1])


def test_model_specs(tmp_path: Path) -> None:
    spec = parse_model("tuned=hub/base+runs/dpo@0.8")
    assert (spec.label, spec.model, spec.lora, spec.lora_scale) == ("tuned", "hub/base", "runs/dpo", 0.8)
    assert parse_model("hub/base").label == "base" and parse_model("hub/base+a/lora").label == "lora"
    odd = tmp_path / "a+b=c"
    odd.mkdir()
    assert parse_model(str(odd)).model == str(odd)
    assert [s.label for s in parse_models(["x/m", "y/m", "ä/ö=?"])] == ["m", "m-2", "ö"]
    for wrong in ("base+", "+lora", "base+lora@strong"):
        with pytest.raises(UserError):
            parse_model(wrong)
    with pytest.raises(UserError, match="no model"):
        parse_models([])


def test_evaluation_from_end_to_end(tiny_model_folder: Path, tmp_path: Path) -> None:
    clip = write_tiny_clip(tmp_path / "clip")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt": p}) + "\n" for i, p in enumerate(PROMPTS)))
    other = write_tiny_model(tmp_path / "other", seed=5)
    models = [f"base={tiny_model_folder}", f"other={other}"]
    sampling = Sampling(steps=2, guidance=1.0, batch=5, device="cpu")
    scorers = f"clip={clip}"
    found = evaluate(models, prompts, scorers, tmp_path / "out", sampling=sampling, progress=False)
    text = found.report.read_text()
    check_self_contained(text)
    (comparison,) = found.comparisons
    assert comparison.prompts == 5 and (comparison.a.label, comparison.b.label) == ("other", "base")
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())["comparisons"][0]
    assert saved["scorers"][0]["overall"]["win_rate"] == comparison.scorers[0].overall.win_rate
    summary = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert summary["models"]["base"]["means"]["prompts"]["clip"] == pytest.approx(comparison.scorers[0].overall.mean_b)
    console = Console(file=io.StringIO(), width=160)
    found.render(console)
    assert "report" in console.file.getvalue()  # type: ignore[attr-defined]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    again = evaluate(models, prompts, scorers, tmp_path / "out", sampling=sampling, progress=False)
    assert all(result.scored == 0 for result in again.scores["prompts"].values())
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")} == before and len(before) == 10
    alone = evaluate(models[:1], prompts, scorers, tmp_path / "out", sampling=sampling, progress=False)
    page = alone.report.read_text()
    check_self_contained(page)
    assert "Mean scores" in page and page.count("<img") == 5 and not alone.comparisons
    with pytest.raises(UserError, match="tiny world only"):
        evaluate(models, "an astronaut", "oracle", tmp_path / "out2", sampling=sampling, progress=False)
    with pytest.raises(UserError, match="primary"):
        evaluate(models, prompts, scorers, tmp_path / "out2", sampling=sampling, primary="oracle", progress=False)
    assert not (tmp_path / "out2").exists()


def test_several_sets_and_seeds(tiny_model_folder: Path, tmp_path: Path) -> None:
    clip = write_tiny_clip(tmp_path / "clip")
    (tmp_path / "ones.txt").write_text("a\nb\n")
    (tmp_path / "twos.txt").write_text("c\nd\ne\n")
    other = write_tiny_model(tmp_path / "other", seed=5)
    models = [f"base={tiny_model_folder}", f"other={other}"]
    sets = [tmp_path / "ones.txt", tmp_path / "twos.txt"]
    sampling = Sampling(steps=1, guidance=1.0, batch=5, device="cpu", seed=(3, 4))
    found = evaluate(models, sets, f"clip={clip}", tmp_path / "out", sampling=sampling, progress=False)
    assert [(s.prompt_set, s.prompts) for s in found.studies] == [("ones", 2), ("twos", 3)]
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "twos" / "base" / "manifest.jsonl").read_text().splitlines()
    ]
    assert [(r["k"], r["seed"]) for r in rows] == [(0, 3), (1, 4)] * 3
    assert len({(tmp_path / "out" / "twos" / "base" / r["image"]).read_bytes() for r in rows}) == 6
    meta = json.loads((tmp_path / "out" / "twos" / "base" / "scores.meta.json").read_text())
    assert meta["prompt_set"] == "twos" and meta["conventions"]["clip"]
    assert found.studies[1].comparisons[0].scorers[0].overall.pairs == 6
    page = found.report.read_text()
    check_self_contained(page)
    assert 'href="#set-2"' in page and 'id="set-2"' in page and "Over all prompt sets" in page and "diversity" in page
    assert "twos: 3 prompts" in (tmp_path / "out" / "report.md").read_text()
    found.report.unlink()
    assert write_report_of([tmp_path / "out"]).is_file()
    with pytest.raises(UserError, match="given twice"):
        evaluate(models, sets, f"clip={clip}", tmp_path / "x", sampling=Sampling(seed=(1, 1)), progress=False)
