"""Comparisons of score files: the numbers, what is refused and why, what is dropped and counted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from diffalign.errors import UserError
from diffalign.eval.compare import compare
from diffalign.eval.rows import Meta, Row, write_meta, write_rows

FINGERPRINT = {"scorer": "clip", "weights": "ab" * 32, "dtype": "fp32"}
Change = Callable[[Row], Row | None]


def write(
    folder: Path, gain: float, prompts: int = 40, seeds: int = 2, change: Change = lambda row: row, **meta: object
) -> Path:
    """scores.jsonl with two scorers; ``change`` may alter or drop a row."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(prompts):
        for k in range(seeds):
            base = float(rng.normal(20, 2))
            for scorer in ("clip", "oracle"):
                value = (
                    base + gain * float(rng.normal(1, 2)) if scorer == "clip" else float((i + k) % 3 == 0 or gain > 0)
                )
                row = Row(
                    f"p{i:03d}",
                    f"prompt {i}",
                    k,
                    7 + k,
                    "ab"[i % 2],
                    f"images/{i}-{k}.png",
                    "0" * 64,
                    scorer,
                    "f" * 16,
                    value,
                    {"layout": value} if scorer == "oracle" else {},
                )
                changed = change(row)
                rows += [changed] if changed else []
    write_rows(folder / "scores.jsonl", rows)
    ids = dict.fromkeys(row.id for row in rows)
    scorers = {"clip": FINGERPRINT, "oracle": {"scorer": "oracle"}}
    sampling = {"settings": {"steps": 20, "guidance": 7.5, "seed": 7}}
    full = {"prompts_sha256": "same", "scorers": scorers, "sampling": sampling, "complete": True, **meta}
    write_meta(folder / "scores.jsonl", Meta(prompts=len(ids), images=len(rows) // 2, **full))  # type: ignore[arg-type]
    return folder


def test_numbers_and_words(tmp_path: Path) -> None:
    a, b = write(tmp_path / "tuned", 1.0), write(tmp_path / "base", 0.0)
    found = compare(a, b, in_loop=["clip"])
    clip, oracle = found.scorers
    assert (clip.scorer, oracle.scorer, clip.in_loop, oracle.in_loop) == ("clip", "oracle", True, False)
    assert found.prompts == 40 and clip.overall.pairs == 80 and not found.notes
    gaps = np.array([p.gain for p in clip.pairs]).reshape(40, 2)
    assert clip.overall.gain == pytest.approx(gaps.mean())
    assert clip.overall.win_rate == pytest.approx(((gaps > 0) + 0.5 * (gaps == 0)).mean())
    assert set(clip.categories) == {"a", "b"} and clip.categories["a"].prompts == 20
    assert oracle.parts["layout"].mean_a == 1 and oracle.overall.lost == 0
    assert clip.holm_p == max(clip.overall.sign_p, clip.holm_p) >= oracle.holm_p
    assert "tuned wins" in found.sentence(1) and "is better" in found.sentence(1)
    back = compare(b, a)
    assert back.scorers[0].overall.win_rate == pytest.approx(1 - clip.overall.win_rate)
    assert back.scorers[0].overall.win_interval.low == pytest.approx(1 - clip.overall.win_interval.high)
    assert "is worse" in back.sentence(1)
    data = json.loads(found.json())
    assert data["scorers"][0]["overall"]["win_interval"]["kind"] == "bca" and "pairs" not in data["scorers"][0]
    console = Console(file=io.StringIO(), width=200)
    found.render(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "clip (in-loop)" in text and "[a]" in text and "layout" in text


def test_a_side_against_itself_is_a_tie(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1.0)
    found = compare(a, a, scorers=["clip"])
    assert found.scorers[0].overall.win_rate == 0.5 and found.scorers[0].holm_p == 1
    assert "tie" in found.sentence() and (found.a.label, found.b.label) == ("A", "B")


def test_missing_scores_drop_the_prompt_on_both_sides(tmp_path: Path) -> None:
    def broken(row: Row) -> Row | None:
        if row.id == "p003" and row.k == 1:
            return replace(row, value=None, error="not readable")
        return None if row.id == "p004" and row.k == 0 else row

    a, b = write(tmp_path / "a", 1.0, change=broken), write(tmp_path / "b", 0.0)
    for found in (compare(a, b), compare(b, a)):
        assert found.prompts == 38 and found.scorers[0].dropped == 2
        assert {p.id for p in found.scorers[0].pairs}.isdisjoint({"p003", "p004"})
        assert any("2 prompts were dropped" in note for note in found.notes)
    fewer = write(tmp_path / "c", 0.0, seeds=1)
    assert compare(a, fewer, scorers=["clip"]).scorers[0].overall.pairs == 39  # k = 1 has no partner; p004 lacks k = 0


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1.0)
    other = write(tmp_path / "text", 0.0, change=lambda r: replace(r, prompt="x") if r.id == "p001" else r)
    with pytest.raises(UserError, match="different prompt lists"):
        compare(a, other)
    ids = write(tmp_path / "ids", 0.0, change=lambda r: replace(r, id="q" + r.id))
    with pytest.raises(UserError, match="share no prompt id"):
        compare(a, ids)
    some = write(
        tmp_path / "some", 0.0, change=lambda r: r if r.id != "p001" else replace(r, id="z"), prompts_sha256="o"
    )
    with pytest.raises(UserError, match="1 prompts stand only in"):
        compare(a, some)
    part = write(tmp_path / "part", 0.0, prompts=30, prompts_sha256="o")
    found = compare(a, part)
    assert found.prompts == 30 and "10 prompts stand in one" in found.notes[0]


def test_other_scorers_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1.0)
    half = write(
        tmp_path / "half", 0.0, scorers={"clip": {**FINGERPRINT, "dtype": "bf16"}, "oracle": {"scorer": "oracle"}}
    )
    with pytest.raises(UserError, match="not comparable: dtype fp32 and bf16"):
        compare(a, half)
    assert compare(a, half, scorers=["oracle"]).prompts == 40
    none = write(tmp_path / "none", 0.0, scorers={"pickscore": FINGERPRINT})
    with pytest.raises(UserError, match="no scorer in common"):
        compare(a, none)
    with pytest.raises(UserError, match=r"has no scores of 'orakle'.*did you mean 'oracle'"):
        compare(a, a, scorers=["orakle"])
    mixed = write(tmp_path / "mixed", 0.0, change=lambda r: replace(r, fingerprint="g" * 16) if r.id == "p001" else r)
    with pytest.raises(UserError, match="mixes versions"):
        compare(a, mixed)
    with pytest.raises(UserError, match="unfinished"):
        compare(a, write(tmp_path / "cut", 0.0, complete=False))
    with pytest.raises(UserError, match="draws"):
        compare(a, a, draws=100)


def test_other_sampling_and_seeds_are_refused_unless_allowed(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1.0)
    steps = write(tmp_path / "steps", 0.0, sampling={"settings": {"steps": 50, "guidance": 7.5, "seed": 7}})
    with pytest.raises(UserError, match=r"sampling differs between a and steps: steps 20 and 50; .* --allow sampling"):
        compare(a, steps)
    assert any("steps 20 and 50" in n for n in compare(a, steps, allow=["sampling"]).notes)
    seeds = write(tmp_path / "seeds", 0.0, change=lambda r: replace(r, seed=3))
    with pytest.raises(UserError, match=r"seeds differ .* --allow seeds"):
        compare(a, seeds)
    assert any("same noise" in n for n in compare(a, seeds, allow=["seeds"]).notes)
    with pytest.raises(UserError, match="did you mean 'seeds'"):
        compare(a, seeds, allow=["seed"])
