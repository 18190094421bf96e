"""The picture sheet of ``diffalign pairs check``: some of the pairs, and some of the rows that were left out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .images import Alpha, ImageError
from .rows import BadRow, ImageRef, PairRow

SIDE = 176  # of one thumbnail
GAP = 12
COLUMNS = 3
LINES = 3
CARD = (2 * SIDE + GAP // 2, SIDE + 18 + LINES * 16 + 22)
INK, FAINT, PAPER = (25, 25, 28), (120, 120, 126), (255, 255, 255)
GREEN, RED, FLAW = (30, 130, 76), (176, 58, 46), (200, 60, 20)


@lru_cache(maxsize=4)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu, which comes with matplotlib and knows most alphabets."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def picture_sheet(
    rows: Sequence[PairRow], bad: Sequence[BadRow], alpha: Alpha, good: int = 12, flawed: int = 6
) -> Image.Image:
    """``good`` pairs spread evenly over the rows, winner left, then up to ``flawed`` left-out rows, one of each reason
    first, framed and with their reason."""
    shown = [rows[i * len(rows) // min(good, len(rows))] for i in range(min(good, len(rows)))]
    left_out = _varied(bad, flawed)
    blocks = [("chosen (left) and rejected (right)", [_pair_card(row, alpha) for row in shown])]
    if left_out:
        blocks.append((f"left out: {len(left_out)} of {len(bad)}", [_bad_card(row, alpha) for row in left_out]))
    width = COLUMNS * CARD[0] + (COLUMNS + 1) * GAP
    height = GAP + sum(30 + -(-len(cards) // COLUMNS) * (CARD[1] + GAP) for _, cards in blocks)
    sheet = Image.new("RGB", (width, height), (240, 240, 242))
    draw, top = ImageDraw.Draw(sheet), GAP
    for title, cards in blocks:
        draw.text((GAP, top), title, INK, font(15, True))
        top += 30
        for start in range(0, len(cards), COLUMNS):
            for place, card in enumerate(cards[start : start + COLUMNS]):
                sheet.paste(card, (GAP + place * (CARD[0] + GAP), top))
            top += CARD[1] + GAP
    return sheet


def _varied(bad: Sequence[BadRow], count: int) -> list[BadRow]:
    """Rows with pictures before rows without, and every reason before any reason's second row."""
    turn: dict[str, int] = {}
    ranked = []
    for place, row in enumerate(sorted(bad, key=lambda row: not row.images)):
        turn[row.reason] = turn.get(row.reason, 0) + 1
        ranked.append((turn[row.reason], place, row))
    return [row for _, _, row in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def _pair_card(row: PairRow, alpha: Alpha) -> Image.Image:
    notes = []
    for ref, score in ((row.chosen, row.chosen_score), (row.rejected, row.rejected_score)):
        size = f"{ref.size[0]}x{ref.size[1]}" if ref.size else ""
        notes.append(size + (f"  score {score:.3g}" if score is not None else ""))
    colours = (FAINT, FAINT) if row.tie else (GREEN, RED)
    labels = ("tie", "tie") if row.tie else ("chosen", "rejected")
    return _card([row.chosen, row.rejected], labels, colours, notes, row.prompt, row.id, alpha)


def _bad_card(row: BadRow, alpha: Alpha) -> Image.Image:
    refs: list[ImageRef | None] = [*row.images, None, None][:2]
    card = _card(refs, (row.reason, ""), (FLAW, FLAW), ("", ""), row.prompt or row.detail, str(row), alpha)
    ImageDraw.Draw(card).rectangle((0, 0, CARD[0] - 1, CARD[1] - 1), outline=FLAW, width=3)
    return card


def _card(
    refs: Sequence[ImageRef | None],
    labels: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    notes: Sequence[str],
    prompt: str,
    foot: str,
    alpha: Alpha,
) -> Image.Image:
    card = Image.new("RGB", CARD, PAPER)
    draw = ImageDraw.Draw(card)
    for place, ref in enumerate(refs):
        left = place * (SIDE + GAP // 2)
        card.paste(_thumbnail(ref, alpha), (left, 18))
        draw.rectangle((left, 0, left + SIDE - 1, 17), fill=colours[place])
        draw.text((left + 5, 2), f"{labels[place]}  {notes[place]}".strip(), PAPER, font(11))
    for number, line in enumerate(_wrap(draw, prompt, CARD[0] - 10)):
        draw.text((5, SIDE + 20 + number * 16), line, INK, font(12))
    draw.text((5, CARD[1] - 17), _cut(draw, foot, CARD[0] - 10, font(10)), FAINT, font(10))
    return card


def _thumbnail(ref: ImageRef | None, alpha: Alpha) -> Image.Image:
    frame = Image.new("RGB", (SIDE, SIDE), (224, 224, 228))
    if ref is None:
        return frame
    try:
        image = ImageOps.contain(ref.load(alpha), (SIDE, SIDE), Image.Resampling.LANCZOS)
    except ImageError as error:
        draw = ImageDraw.Draw(frame)
        draw.line((0, 0, SIDE, SIDE), FLAW, 2)
        draw.line((0, SIDE, SIDE, 0), FLAW, 2)
        draw.text((6, SIDE - 18), _cut(draw, str(error), SIDE - 12, font(11)), INK, font(11))
        return frame
    frame.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return frame


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int, face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, shortened to ``width`` pixels."""
    if draw.textlength(text, face) <= width:
        return text
    while text and draw.textlength(text + "…", face) > width:
        text = text[:-1]
    return text + "…"


def _wrap(draw: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    """At most LINES lines of ``width`` pixels; scripts without spaces are broken anywhere."""
    lines: list[str] = []
    rest = " ".join(text[:600].split())
    while rest and len(lines) < LINES:
        end = len(rest)
        while end > 1 and draw.textlength(rest[:end], font(12)) > width:
            end = rest.rfind(" ", 0, end) if " " in rest[:end].rstrip() and end < 200 else end - max(1, end // 50)
        if len(lines) == LINES - 1:
            return [*lines, _cut(draw, rest, width, font(12))]
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines
