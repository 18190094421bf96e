"""What is to be labelled: pairs as they stand, or the pictures of each prompt dealt into pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..data.ranked import is_ranked, open_ranked
from ..data.readers import PAIR_COLUMNS, open_images, open_pairs, table_of
from ..data.reading import Progress
from ..data.rows import ImageRef, Report, digest_of
from ..data.table import Table
from ..data.tables import METADATA, read_text_table
from ..errors import UserError
from ..recipe import DataRecipe

MANIFEST = "manifest.jsonl"  # what `diffalign sample` writes beside its pictures


@dataclass(frozen=True)
class Pair:
    """Two different pictures of a prompt, in the order of their digests."""

    id: str
    prompt: str
    pictures: tuple[ImageRef, ImageRef]

    @staticmethod
    def of(prompt: str, one: ImageRef, other: ImageRef) -> Pair:
        """Whichever is named first, the pair is the same."""
        first, second = sorted((one, other), key=lambda ref: ref.digest)
        return Pair(pair_id(prompt, first.digest, second.digest), prompt, (first, second))


def pair_id(prompt: str, one: str, other: str) -> str:
    """A pair's name from its prompt and its pictures' digests, in any order: the same content is the same pair."""
    return digest_of(prompt.encode(), *(digest.encode() for digest in sorted((one, other))))[:16]


def read_candidates(
    recipe: DataRecipe, per_prompt: int | None = None, progress: Progress | None = None
) -> tuple[list[Pair], list[Report]]:
    """The pairs of ``recipe.path`` in the order in which they are shown, each once, and the account of the rest.

    Pairs stand as they are; what they say of winner and loser is not looked at. Ranked lists and captioned pictures are
    dealt: all pairs of a prompt's pictures, or ``per_prompt`` of them, in rounds in which every picture meets another
    one; the first pair of each prompt comes before the second of any. A folder that holds samples of one or several
    models (``manifest.jsonl`` in it or in the folders under it) is one set of pictures.

    Raises:
        UserError: as ``read_pairs``; no prompt with two different pictures; a stream.
    """
    if recipe.streaming:
        raise UserError("pictures are looked at several times, and data.streaming reads them once; leave it out")
    pairs: list[tuple[int, Pair]] = []
    pictures: dict[str, dict[str, ImageRef]] = {}
    reports = []
    for table in _tables(recipe):
        if PAIR_COLUMNS & set(table.columns):
            reading = open_pairs(recipe, progress, table)
            pairs += [(0, Pair.of(row.prompt, row.chosen, row.rejected)) for row in reading.rows]
            reports.append(reading.report)
        else:
            dealt = (open_ranked if is_ranked(table) else open_images)(recipe, progress, table)
            for row in dealt.rows:
                pictures.setdefault(row.prompt, {}).update({ref.digest: ref for ref in row.images.values()})
            reports.append(dealt.report)
    for prompt, refs in pictures.items():
        ordered = [refs[digest] for digest in sorted(refs)]  # by content: says nothing of model or rank
        for place, (a, b) in enumerate(islice(rounds(len(ordered)), per_prompt)):
            pairs.append((place, Pair.of(prompt, ordered[a], ordered[b])))
    pairs.sort(key=lambda found: found[0])
    different = {pair.id: pair for _, pair in pairs if pair.pictures[0].digest != pair.pictures[1].digest}
    if not different:
        raise UserError(
            f"no prompt in '{recipe.path}' has two different pictures; draw more with `diffalign sample --per-prompt 2`"
        )
    return list(different.values()), reports


def rounds(count: int) -> Iterator[tuple[int, int]]:
    """All pairs of ``count`` things, round by round; in a round each is in one pair at most (the circle method)."""
    ring: list[int | None] = [*range(count), *[None] * (count % 2)]
    half = len(ring) // 2
    for _ in range(len(ring) - 1):
        for a, b in zip(ring[:half], reversed(ring[half:]), strict=True):
            if a is not None and b is not None:
                yield a, b
        ring.insert(1, ring.pop())


def _tables(recipe: DataRecipe) -> Sequence[Table]:
    place = Path(recipe.path).expanduser()
    named = [recipe.path.endswith(MANIFEST)] + [(place / name).is_file() for name in METADATA]
    if not place.is_dir() or any(named):
        return [table_of(recipe)]
    found = [place / MANIFEST] if (place / MANIFEST).is_file() else sorted(place.glob(f"*/{MANIFEST}"))
    return [read_text_table(file) for file in found] or [table_of(recipe)]
