"""What is to be scored: (image, prompt) pairs from a manifest, from a table (JSON lines, CSV, Parquet, WebDataset), or
from a plain folder of images and a prompt file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .promptfiles import CATEGORY_COLUMNS, ID_COLUMNS, PROMPT_COLUMNS
from .prompts import Prompt, is_source, read_prompts, read_table, set_name, text_id

if TYPE_CHECKING:
    from ..data.rows import ImageRef
    from ..data.table import Table

IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "jpg", "png")
TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet", ".tar")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Item:
    """One image of one prompt. ``k`` counts the images of a prompt; ``image`` is its name, relative to the source;
    ``place`` is its file, its (table, row, column), or a reference of the training data."""

    id: str
    prompt: str
    category: str | None
    k: int
    seed: int | None
    image: str
    place: Path | tuple[Table, int, str] | ImageRef

    def read(self) -> bytes:
        """The encoded bytes. Raises OSError."""
        if isinstance(self.place, Path):
            return self.place.read_bytes()
        from ..data.images import ImageError

        try:
            if not isinstance(self.place, tuple):
                return self.place.read()
            table, row, column = self.place
            found = table.image(row, column)
        except ImageError as error:
            raise OSError(str(error)) from error
        return found.read_bytes() if isinstance(found, Path) else found


@dataclass(frozen=True)
class ItemSet:
    """Items in the order they will be scored, their prompts in order, what was decided on the way, and what the list
    of prompts is called where a file or set named them."""

    items: list[Item]
    prompts: list[Prompt]
    notes: list[str]
    set_name: str | None = None


def read_items(images: str | Path, prompts: str | Path | None = None) -> ItemSet:
    """Items of a folder with ``manifest.jsonl`` (as `diffalign sample` writes it), a table, or a plain folder.

    A table (.jsonl, .csv, .parquet, .tar, a pattern ``x-{00..12}.tar``, or a folder of Parquet or tar shards) has
    columns for the picture (``image``, ``file_name``, ``path``, ``jpg``, ``png``: bytes or paths relative to it) and
    for the ``prompt`` (``caption``, ``text``), and where there are any ``id``, ``k``, ``seed``, ``category``. A plain
    folder needs ``prompts``: one text for all images, or a file whose rows are matched by a column ``image``, by file
    names ``<id>`` or ``<id>-<k>``, or, when there are as many images as prompts, by sorted order.

    Raises:
        UserError: nothing there, a broken manifest, an id and k that come twice, or images and prompts that do not fit
            (the message says which are missing).
    """
    found = _read_items(Path(images), prompts)
    named = set_name(prompts) if prompts is not None else None
    return ItemSet(found.items, found.prompts, found.notes, named)


def _read_items(source: Path, prompts: str | Path | None) -> ItemSet:
    manifest = source / MANIFEST if source.is_dir() else source
    if manifest.name == MANIFEST and manifest.is_file():
        return _from_manifest(manifest, prompts)
    if source.suffix in TABLE_SUFFIXES or "{" in str(source):
        return _from_table(source, prompts)
    if not source.is_dir():
        raise UserError(
            f"images '{source}' is no folder, no manifest.jsonl and no table ({', '.join(TABLE_SUFFIXES)}); give the "
            "folder of the images"
        )
    files = sorted((p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES), key=_natural)
    if not files:
        if any(source.rglob("*.parquet")) or any(source.rglob("*.tar")):
            return _from_table(source, prompts)
        raise UserError(f"folder '{source}' holds no images ({', '.join(IMAGE_SUFFIXES)})")
    if prompts is None and any((source / f"metadata{suffix}").is_file() for suffix in (".jsonl", ".csv")):
        return _from_table(source, None)
    if prompts is None:
        raise UserError(f"folder '{source}' has no {MANIFEST}; say with --prompts what the images should show")
    return _from_folder(source, files, str(prompts))


def _from_table(source: Path, prompts: str | Path | None) -> ItemSet:
    from ..data.images import ImageError
    from ..data.tables import open_table

    try:
        table = open_table(str(source))
    except UserError as error:
        raise UserError(str(error).replace("data.path", "images")) from error
    picture = next((c for c in IMAGE_COLUMNS if c in table.columns), None)
    picture = picture or next((c for c in table.columns if table.holds_bytes(c)), None)
    have = ", ".join(table.columns) or "none"
    if picture is None:
        raise UserError(f"'{source}' has no column of pictures (columns: {have}); name it 'image'")
    text_column = next((c for c in PROMPT_COLUMNS if c in table.columns), None)
    one = read_prompts(prompts) if prompts is not None else []
    if len(one) != 1 and (one or text_column is None):
        raise UserError(f"'{source}' needs a column 'prompt' (columns: {have}), or one text for all with --prompts")

    def first(row: int, names: Sequence[str]) -> object:
        return next((v for c in names if c in table.columns and (v := table.value(row, c)) is not None), None)

    items: list[Item] = []
    ordered: dict[str, Prompt] = {}
    ids: dict[tuple[str, int], int] = {}
    drawn: dict[str, int] = {}
    for row in range(table.total or 0):
        where = table.place(row)
        try:
            text = one[0].prompt if one else first(row, [str(text_column)])
            identity, category = first(row, ID_COLUMNS), first(row, CATEGORY_COLUMNS)
            stated, seed = first(row, ["k"]), first(row, ["seed"])
            name = where if table.holds_bytes(picture) else str(table.value(row, picture))
        except ImageError as error:
            raise UserError(f"{where} of '{source}' cannot be read: {error}") from error
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where} of '{source}' has an empty prompt; every row needs one")
        own = str(identity) if identity is not None else text_id(text)
        k = int(str(stated)) if stated is not None else (drawn.get(own, -1) + 1 if identity is None else 0)
        drawn[own] = k
        if (own, k) in ids:
            raise UserError(
                f"id '{own}'{f', k {k}' if k else ''} stands at {table.place(ids[own, k])} and {where} of '{source}'; "
                "ids must differ"
            )
        ids[own, k] = row
        kind = None if category is None else str(category)
        if ordered.setdefault(own, Prompt(own, text, kind)).prompt != text:
            raise UserError(f"'{source}' has two prompts under id '{own}' ({where}); ids must differ")
        items.append(Item(own, text, kind, k, None if seed is None else int(str(seed)), name, (table, row, picture)))
    if not items:
        raise UserError(f"'{source}' holds no rows")
    bad = [f"{len(table.bad)} rows of '{source}' are none and are left out"] if table.bad else []
    return ItemSet(items, list(ordered.values()), bad)


def _from_manifest(manifest: Path, prompts: str | Path | None) -> ItemSet:
    items: list[Item] = []
    seen: set[tuple[str, int]] = set()
    ordered: dict[str, Prompt] = {}
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            identity, text, image = str(row["id"]), row["prompt"], row["image"]
            item = Item(
                identity,
                text,
                row.get("category"),
                int(row.get("k", 0)),
                row.get("seed"),
                image,
                manifest.parent / image,
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"line {number} of '{manifest}' is no manifest row ({error!r}); it needs id, prompt, image"
            ) from error
        if (item.id, item.k) in seen:
            raise UserError(f"'{manifest}' has id '{item.id}', k {item.k} twice (line {number}); ids must differ")
        if ordered.setdefault(item.id, Prompt(item.id, text, item.category)).prompt != text:
            raise UserError(f"'{manifest}' has two prompts under id '{item.id}' (line {number}); ids must differ")
        seen.add((item.id, item.k))
        items.append(item)
    if not items:
        raise UserError(f"'{manifest}' is empty; sample first")
    notes: list[str] = []
    if prompts is not None:
        wanted = {p.id: p for p in read_prompts(prompts)}
        strange = [i for i, p in ordered.items() if i in wanted and wanted[i].prompt != p.prompt]
        if strange:
            raise UserError(
                f"prompt '{strange[0]}' differs between '{manifest}' and '{prompts}'; give the set that was sampled"
            )
        missing = [i for i in wanted if i not in ordered]
        if len(missing) == len(wanted):
            raise UserError(
                f"'{manifest}' holds none of the prompts of '{prompts}'; leave --prompts out to score all it has"
            )
        if missing:
            notes.append(f"{len(missing)} prompts of '{prompts}' have no image ({_some(missing)})")
        items = [item for item in items if item.id in wanted]
        ordered = {i: wanted[i] for i in wanted if i in ordered}
    return ItemSet(items, list(ordered.values()), notes)


def _from_folder(root: Path, files: Sequence[Path], source: str) -> ItemSet:
    names = [p.relative_to(root).as_posix() for p in files]
    if is_source(source):
        table = read_table(source)
        column = next((c for c in ("image", "file_name", "filename") if table and c in table[0][1]), None)
        prompts = read_prompts(source)
        if column is not None:
            return _by_column(root, names, prompts, [str(row.get(column, "")) for _, row in table], source)
    else:
        prompts = read_prompts(source)
    if len(prompts) == 1:
        only = prompts[0]
        items = [Item(only.id, only.prompt, only.category, k, None, n, root / n) for k, n in enumerate(names)]
        return ItemSet(items, prompts, [])
    by_id = {p.id: p for p in prompts}
    matched = [(_split_name(Path(name).stem, by_id), name) for name in names]
    if any(found is not None for found, _ in matched):
        return _by_name(root, matched, by_id, source)
    if len(names) != len(prompts):
        short, long = sorted((len(names), len(prompts)))
        lacking = f"image {names[short]}" if len(names) == long else f"prompt '{prompts[short].prompt[:40]}'"
        raise UserError(
            f"{len(names)} images in '{root}' but {len(prompts)} prompts in '{source}' (the first without a partner: "
            f"{lacking}); name the images <id>.png or <id>-<k>.png, or add a column 'image'"
        )
    items = [Item(p.id, p.prompt, p.category, 0, None, n, root / n) for p, n in zip(prompts, names, strict=True)]
    return ItemSet(items, prompts, [f"images and prompts of '{source}' are paired by sorted order"])


def _by_column(
    root: Path, names: Sequence[str], prompts: Sequence[Prompt], images: Sequence[str], source: str
) -> ItemSet:
    have = set(names)
    missing = [image for image in images if image not in have]
    if missing:
        raise UserError(
            f"{len(missing)} images of '{source}' are not in '{root}' ({_some(missing)}); paths are relative to it"
        )
    items = [Item(p.id, p.prompt, p.category, 0, None, n, root / n) for p, n in zip(prompts, images, strict=True)]
    spare = len(have) - len(set(images))
    return ItemSet(items, list(prompts), [f"{spare} images of '{root}' are not in '{source}'"] if spare else [])


def _by_name(
    root: Path, matched: Sequence[tuple[tuple[str, int] | None, str]], prompts: dict[str, Prompt], source: str
) -> ItemSet:
    items: dict[tuple[str, int], Item] = {}
    for found, name in matched:
        if found is None:
            raise UserError(
                f"image '{name}' in '{root}' belongs to no prompt id of '{source}'; name it <id>.png or <id>-<k>.png"
            )
        if found in items:
            raise UserError(f"images '{items[found].image}' and '{name}' both stand for id '{found[0]}', k {found[1]}")
        prompt = prompts[found[0]]
        items[found] = Item(prompt.id, prompt.prompt, prompt.category, found[1], None, name, root / name)
    missing = [i for i in prompts if not any(key[0] == i for key in items)]
    if missing:
        raise UserError(f"{len(missing)} prompts of '{source}' have no image in '{root}' ({_some(missing)})")
    order = {identity: place for place, identity in enumerate(prompts)}
    return ItemSet(sorted(items.values(), key=lambda i: (order[i.id], i.k)), list(prompts.values()), [])


def _split_name(stem: str, prompts: dict[str, Prompt]) -> tuple[str, int] | None:
    """``<id>``, ``<id>-<k>`` or ``<id>_<k>`` -> (id, k)."""
    if stem in prompts:
        return stem, 0
    match = re.fullmatch(r"(.+)[-_](\d+)", stem)
    return (match[1], int(match[2])) if match and match[1] in prompts else None


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
