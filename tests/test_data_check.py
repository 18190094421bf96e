"""``pairs check`` counts what is there, and its sheet shows it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from diffalign.data.check import check_pairs
from diffalign.data.readers import read_pairs
from diffalign.data.sheet import CARD, COLUMNS, GAP, SIDE, picture_sheet
from diffalign.errors import UserError
from diffalign.recipe import DataRecipe


def picture(colour: tuple[int, int, int], size: tuple[int, int], path: Path) -> None:
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """8 pairs, green against red; 2 ties, 1 truncated, 1 missing."""
    data = tmp_path / "pairs"
    data.mkdir()
    rows = []
    for i in range(12):
        picture((0, 200 + i, 0), (96 if i % 2 else 64, 64), data / f"g{i}.png")
        picture((200 + i, 0, 0), (64, 64), data / f"r{i}.png")
        prompt = "a long prompt about many things " * 4 if i == 3 else f"thing {i // 2} [brackets]"
        rows.append(
            {"prompt": prompt, "chosen": f"g{i}.png", "rejected": f"r{i}.png", "chosen_score": i, "rejected_score": 5}
        )
    rows[8]["tie"] = rows[9]["tie"] = True
    (data / "g10.png").write_bytes((data / "g10.png").read_bytes()[:-40])
    rows[11]["rejected"] = "none.png"
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return data


def test_report_counts(folder: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    found = check_pairs(DataRecipe(path=str(folder), cache=False), tmp_path / "out", str(tiny_model_folder))
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved == json.loads(json.dumps(found.json()))
    assert saved["rows"] == 12 and saved["usable"] == 8
    assert saved["left_out"] == {"tie": 2, "unreadable image": 1, "missing image": 1}
    assert saved["sizes"] == {"64x64": 12, "96x64": 4} and saved["aspect_ratios"] == {"1:1": 12, "3:2": 4}
    assert saved["smaller_than_resolution"] == 16 and saved["resolution"] == 512
    assert saved["prompts"] == 5 and saved["repeated_prompts"] == 3 and saved["most_repeated_prompt"]["pairs"] == 2
    # 104 letters and two marks against 77 places
    assert saved["cut_prompts"] == [{"prompt": "a long prompt about many things " * 4, "tokens_lost": 29}]
    assert saved["score_gaps"] == {"pairs": 8, "min": -5, "median": -1.5, "mean": -1.5, "max": 2, "not_positive": 6}
    text = (tmp_path / "out" / "report.txt").read_text()
    for line in ("left out", "metadata.jsonl line 12: missing image", "29 tokens lost", "96x64", "6 of 8"):
        assert line in text


def test_report_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    found = check_pairs(DataRecipe(path=str(folder), cache=False, max_pairs=4), tmp_path / "o")
    found.render(Console(file=out, width=160))
    text = out.getvalue()
    assert "usable" in text and "64x64" in text and "not looked at (data.max_pairs)" in text
    assert "not checked: name the model" in text and "sheet.png" in text


def test_sheet_shows_winners_left_and_flaws_framed(folder: Path) -> None:
    found = read_pairs(DataRecipe(path=str(folder), cache=False))
    sheet = np.asarray(picture_sheet(found.rows, found.report.bad, "white", good=6)).astype(int)
    assert sheet.shape[1] == COLUMNS * CARD[0] + (COLUMNS + 1) * GAP
    top = GAP + 30 + 18 + SIDE // 2
    for place, i in enumerate((0, 1, 2)):
        left = GAP + place * (CARD[0] + GAP)
        assert sheet[top, left + SIDE // 2].tolist() == [0, 200 + i, 0]
        assert sheet[top, left + SIDE + GAP // 2 + SIDE // 2].tolist() == [200 + i, 0, 0]
    bottom = GAP + 30 + 2 * (CARD[1] + GAP) + 30
    assert sheet[bottom + 1, GAP + 40].tolist() == [200, 60, 20] and sheet[bottom + CARD[1] - 2, GAP + 40].tolist() == [
        200,
        60,
        20,
    ]


def test_sheet_takes_any_text_and_few_rows(tmp_path: Path) -> None:
    rows = []
    for i, prompt in enumerate(["日本語の長い文章" * 40, "x" * 900, "Кот и пёс, 🐈 " * 30]):
        picture((i, 9, 9), (16, 32), tmp_path / f"a{i}.png")
        picture((i, 90, 9), (50, 32), tmp_path / f"b{i}.png")
        rows.append({"prompt": prompt, "chosen": f"a{i}.png", "rejected": f"b{i}.png"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    check_pairs(DataRecipe(path=str(tmp_path), cache=False), tmp_path / "out")
    assert Image.open(tmp_path / "out" / "sheet.png").width > 1000


def test_unwritable_report_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not writable"):
        check_pairs(DataRecipe(path=str(folder), cache=False), tmp_path / "file" / "out")
