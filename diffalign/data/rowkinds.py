"""Packed rows beyond pairs and pictures: rated pictures and ranked lists, and how pairs are read as either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .rows import ImageRef, PairRow, RankedRow, RatedRow
from .rowtable import Column, Packed, PairRows

LIKED, DISLIKED = "+", "-"  # behind the id of a pair, in the ids of its two rated pictures
NO_SCORES = (1.0, 0.0)  # of the pictures of a pair without scores


class Stem(Column):
    """Ids without their last letter: those of the pairs that rated pictures come from."""

    def shown(self, text: str) -> str:
        return text[:-1]


class RatedRows(Packed[RatedRow]):
    """Pictures that were liked or not. ``of_pairs``: each two of them are a pair's."""

    sides = ("image",)
    texts = ("prompt",)
    numbers = ("label",)
    of_pairs = False

    @property
    def groups(self) -> Sequence[str]:
        """The ids; those of the pairs, where pairs were read as rated pictures."""
        return Stem(self, "id") if self.of_pairs else self.ids

    def _row(self, values: dict[str, Any]) -> RatedRow:
        return RatedRow(values["id"], values["prompt"], self._ref(values, "image"), values["label"])


class RankedRows(Packed[RankedRow]):
    """Lists of pictures of one prompt, best first; ``longest`` is how many each row holds: shorter ones are padded.
    ``rewards``: names of further scores."""

    texts = ("prompt",)

    def __init__(
        self, table: Any = None, folder: Path | None = None, longest: int = 2, rewards: Sequence[str] = ()
    ) -> None:
        self.longest, self.rewards = longest, tuple(rewards)
        self.sides = tuple(f"image_{k}" for k in range(longest))
        self.numbers = tuple(f"{name}_{k}" for name in ("score", *rewards) for k in range(longest))
        super().__init__(table, folder)

    @classmethod
    def of_schema(cls, schema: pa.Schema, table: Any, folder: Path | None) -> RankedRows:
        longest = sum(name.endswith("_digest") for name in schema.names)
        last = schema.get_field_index("score_0") + longest  # the numbers stand at the end
        return cls(table, folder, longest, [name[:-2] for name in schema.names[last::longest]])

    def append(self, row: RankedRow) -> None:
        super().append(row.padded(self.longest))

    def _row(self, values: dict[str, Any]) -> RankedRow:
        scores, *rewards = (
            tuple(values[f"{name}_{k}"] for k in range(self.longest)) for name in ("score", *self.rewards)
        )
        pictures = tuple(self._ref(values, side) for side in self.sides)
        return RankedRow(
            values["id"], values["prompt"], pictures, scores, tuple(zip(self.rewards, rewards, strict=True))
        )


def _moved(pairs: PairRows, batch: pa.RecordBatch, made: Packed[Any], more: dict[str, Any]) -> None:
    """One more batch of ``made``: columns of pairs under the names in ``more``, or the values there."""
    arrays = []
    for field in made.schema:
        found = more.get(field.name, field.name)
        arrays.append(batch.column(found) if isinstance(found, str) else found)
    made._take(pa.RecordBatch.from_arrays(arrays, schema=made.schema))
    made._mapped = len(made._batches)


def _picture(side: str, name: str) -> dict[str, str]:
    return {f"{name}_{part}": f"{side}_{part}" for part in ("column", "path", "digest", "width", "height")}


def rated(pairs: PairRows) -> RatedRows:
    """The chosen pictures as liked, the rejected ones as not, over the same memory; pairs that are ties are left out.

    A picture that stands in several pairs is there as often, perhaps liked here and not there."""
    made = RatedRows(pairs.table, pairs.folder)
    made.of_pairs = True
    for whole in pairs.batches():
        batch = whole.filter(pc.equal(pc.fill_null(whole.column("tie"), 0.0), 0.0))
        texts = batch.column("prompt")
        for side, mark, label in (("chosen", LIKED, 1.0), ("rejected", DISLIKED, -1.0)):
            if side == "rejected":
                texts = pc.coalesce(batch.column("rejected_prompt"), texts)
            ids = pc.binary_join_element_wise(batch.column("id"), mark, "")
            labels = pa.array([label] * len(batch), pa.float64())
            _moved(pairs, batch, made, _picture(side, "image") | {"id": ids, "prompt": texts, "label": labels})
    made.present = {"prompt": None, "label": None}
    return made


def rated_stream(rows: Iterator[PairRow]) -> Iterator[RatedRow]:
    """The same of pairs that pass by."""
    for row in rows:
        if not row.tie:
            yield RatedRow(row.id + LIKED, row.prompt, row.chosen, 1.0)
            yield RatedRow(row.id + DISLIKED, row.rejected_prompt or row.prompt, row.rejected, -1.0)


def lists(pairs: PairRows, ties: bool = True) -> RankedRows:
    """Pairs as lists of two over the same memory: with their scores where they have both, the higher one first; else
    the chosen picture with 1 and the rejected one with 0. Of a tie without scores both have 1. ``ties``: whether lists
    of two equal scores are there."""
    made = RankedRows(pairs.table, pairs.folder)
    for whole in pairs.batches():
        batch = whole if ties else whole.filter(_uneven(whole))
        scored = pc.and_(batch.column("chosen_score").is_valid(), batch.column("rejected_score").is_valid())
        tie = pc.equal(pc.fill_null(batch.column("tie"), 0.0), 1.0)
        first = pc.if_else(scored, batch.column("chosen_score"), NO_SCORES[0])
        second = pc.if_else(scored, batch.column("rejected_score"), pc.if_else(tie, NO_SCORES[0], NO_SCORES[1]))
        turned = pc.greater(second, first)
        more: dict[str, Any] = {
            "score_0": pc.if_else(turned, second, first),
            "score_1": pc.if_else(turned, first, second),
        }
        for (name, own), (_, other) in zip(
            _picture("chosen", "image_0").items(), _picture("rejected", "image_1").items(), strict=True
        ):
            a, b = batch.column(own), batch.column(other)
            more |= {name: pc.if_else(turned, b, a), name.replace("image_0", "image_1"): pc.if_else(turned, a, b)}
        _moved(pairs, batch, made, more)
    made.present = {"prompt": None, "score_0": None, "score_1": None}
    return made


def _uneven(batch: pa.RecordBatch) -> pa.BooleanArray:
    """Which pairs are lists of two different scores."""
    scores = (batch.column("chosen_score"), batch.column("rejected_score"))
    plain = pc.equal(pc.fill_null(batch.column("tie"), 0.0), 0.0)  # without both scores
    return pc.fill_null(pc.not_equal(*scores), plain)


def lists_stream(rows: Iterator[PairRow]) -> Iterator[RankedRow]:
    """The same of pairs that pass by."""
    for row in rows:
        both = row.chosen_score, row.rejected_score
        scores = (1.0, 1.0) if row.tie else NO_SCORES
        if both[0] is not None and both[1] is not None:
            scores = both[0], both[1]
        pictures: tuple[ImageRef, ImageRef] = (row.chosen, row.rejected)
        turned = scores[1] > scores[0]
        yield RankedRow(row.id, row.prompt, pictures[::-1] if turned else pictures, scores[::-1] if turned else scores)
