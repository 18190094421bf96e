"""Contact sheets: images in rows and columns, with labels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LINE, PAPER, INK = 4, 16, (255, 255, 255), (20, 20, 20)


def grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    upscale: int | None = None,
) -> Image.Image:
    """Images side by side, row by row, each in a cell of the largest size; ``.info["tiles"]`` of the sheet lists
    (left, top, width, height) of each.

    Args:
        columns: default: as near to a square as it goes.
        labels: one text above each image, in at most two lines of the cell's width.
        upscale: whole factor, nearest neighbour. Default: what brings a small image to about 192 pixels.

    Raises:
        ValueError: no images, or labels of another number.
    """
    if not images:
        raise ValueError("a grid needs at least one image")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    columns = columns or max(1, round(len(images) ** 0.5 + 0.499))
    largest = max(max(image.size) for image in images)
    factor = upscale or max(1, 192 // largest)
    scaled = [
        im.convert("RGB").resize((im.width * factor, im.height * factor), Image.Resampling.NEAREST) for im in images
    ]
    width, height = max(im.width for im in scaled), max(im.height for im in scaled)
    font = ImageFont.load_default(size=12)
    texts = [_lines(label, width, font) for label in labels or []]
    head = LINE * max((len(text) for text in texts), default=0)
    rows = -(-len(images) // columns)
    cell = (width + GAP, height + head + GAP)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    tiles = []
    for number, image in enumerate(scaled):
        x, y = GAP + (number % columns) * cell[0], GAP + (number // columns) * cell[1]
        for line, text in enumerate(texts[number] if texts else []):
            draw.text((x, y + line * LINE), text, fill=INK, font=font)
        sheet.paste(image, (x, y + head))
        tiles.append((x, y + head, image.width, image.height))
    sheet.info["tiles"] = tiles
    return sheet


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int = 2) -> list[str]:
    """The text broken at words into at most ``most`` lines; what does not fit ends in an ellipsis."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if len(lines) < most and lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_cut(line, width, font) for line in lines]


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
