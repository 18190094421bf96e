"""Compare two score files: paired win rates with intervals and tests, or a refusal that says why.

More than two: :mod:`.study`, which is made of these."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, nearest
from .rows import Row, ScoreFile, read_score_file
from .stats import DRAWS, LEVEL, SEED, Interval, Paired, holm, paired

if TYPE_CHECKING:
    from rich.console import Console

MIN_DRAWS = 2000
SAME_SETTINGS = ("steps", "guidance", "scheduler", "height", "width", "negative_prompt")
ALLOW = ("sampling", "seeds")  # differences that a person may wave through


@dataclass(frozen=True)
class Side:
    """One of the two models: its label, score file, the folder its image names are relative to, its sampling."""

    label: str
    path: Path
    images: Path
    sampling: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt and seed, with their scores."""

    id: str
    prompt: str
    category: str | None
    k: int
    image_a: str
    image_b: str
    a: float
    b: float

    @property
    def gain(self) -> float:
        return self.a - self.b


@dataclass(frozen=True)
class ScorerComparison:
    """One scorer's verdict. ``holm_p``: the sign test's p, corrected for the number of scorers.

    ``parts``: the same for the parts of a score (the oracle's layout, colours, shapes)."""

    scorer: str
    fingerprint: dict[str, str]
    overall: Paired
    holm_p: float
    categories: dict[str, Paired]
    parts: dict[str, Paired]
    in_loop: bool
    dropped: int
    pairs: list[Pair] = field(repr=False)

    @property
    def judges(self) -> bool:
        """Whether every score is 1 or 0: right or wrong."""
        return all(value in (0.0, 1.0) for pair in self.pairs for value in (pair.a, pair.b))


@dataclass(frozen=True)
class Comparison:
    """A against B. Win rates are A's; gains are A minus B."""

    a: Side
    b: Side
    scorers: list[ScorerComparison]
    prompts: int
    prompts_sha256: str
    level: float
    draws: int
    seed: int
    notes: list[str]

    def sentence(self, which: int = 0) -> str:
        """The verdict of one scorer in plain words."""
        s = self.scorers[which]
        r = s.overall
        low, high = r.win_interval.low, r.win_interval.high
        head = (
            f"{self.a.label} wins {r.win_rate:.1%} of {r.prompts} prompts against {self.b.label} by {s.scorer}"
            f"{', ties counted one half' if r.tied else ''} ({self.level:.0%} interval {low:.1%} to {high:.1%})."
        )
        if s.judges:
            gain = r.gain_interval
            head += (
                f" {r.mean_a:.1%} of its images are right, {r.mean_b:.1%} of {self.b.label}'s: "
                f"{100 * r.gain:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})."
            )
        if low > 0.5:
            return f"{head} The interval lies above one half: {self.a.label} is better by this scorer."
        if high < 0.5:
            return f"{head} The interval lies below one half: {self.a.label} is worse by this scorer."
        if r.tied == r.prompts:
            return f"{head} Every prompt is a tie: no difference was seen."
        return f"{head} The interval holds one half: these prompts do not tell the two apart."

    def json(self) -> str:
        """All numbers, without the pairs."""
        data = asdict(replace(self, scorers=[replace(s, pairs=[]) for s in self.scorers]))
        for scorer in data["scorers"]:
            del scorer["pairs"]
        return json.dumps(data, indent=2, default=str, ensure_ascii=False)

    def render(self, console: Console) -> None:
        """A table for a person, then the verdict in words."""
        from rich.table import Table

        table = Table(title=f"{self.a.label} against {self.b.label}, {self.prompts} prompts")
        for name in (
            "scorer",
            self.a.label,
            self.b.label,
            "gain",
            "win rate",
            "won/tied/lost",
            "sign test p",
            "Holm p",
        ):
            table.add_column(name, justify="left" if name == "scorer" else "right")
        for s in self.scorers:
            table.add_row(s.scorer + (" (in-loop)" if s.in_loop else ""), *cells(s.overall), f"{s.holm_p:.2g}")
            for name, part in s.parts.items():
                table.add_row(f"  {name}", *cells(part), "", style="dim")
            for name, part in s.categories.items():
                table.add_row(f"  [{name}]".replace("[", "\\["), *cells(part), "", style="dim")
        console.print(table)
        for i in range(len(self.scorers)):
            console.print(self.sentence(i), highlight=False, markup=False)
        for note in self.notes:
            console.print(f"note: {note}", highlight=False, markup=False)


def cells(r: Paired) -> list[str]:
    """mean A, mean B, gain with interval, win rate with interval, won/tied/lost, sign test p; as texts."""
    return [
        f"{r.mean_a:.4g}",
        f"{r.mean_b:.4g}",
        f"{r.gain:+.3g} {span(r.gain_interval, '+.3g')}",
        f"{r.win_rate:.1%} {span(r.win_interval, '.1%')}",
        f"{r.won}/{r.tied}/{r.lost}",
        f"{r.sign_p:.2g}",
    ]


def span(interval: Interval, form: str) -> str:
    """An interval as text."""
    return f"({interval.low:{form}}, {interval.high:{form}})"


def compare(
    a: str | Path,
    b: str | Path,
    *,
    scorers: Sequence[str] | None = None,
    labels: tuple[str, str] | None = None,
    in_loop: Iterable[str] = (),
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = SEED,
    allow: Iterable[str] = (),
) -> Comparison:
    """Paired comparison of two score files, or of folders that hold one each.

    Scores are paired by (prompt id, k). A prompt that lacks a score on either side is dropped on both, and counted.
    Bootstraps are stratified by category where every category has at least two prompts.

    Args:
        scorers: names; None takes all that both files have.
        in_loop: scorers that were used in training; they are marked.
        allow: of `ALLOW`; such differences become a note instead of a refusal.

    Raises:
        UserError: no scorer in common, other fingerprints, prompts, seeds or sampling, or nothing left to pair.
    """
    first, second = read_score_file(a), read_score_file(b)
    left, right = sides_of([first, second], labels)
    found = compare_files(first, second, (left, right), scorers, set(in_loop), level, draws, seed, allow)
    return with_holm([found])[0]


def compare_files(
    first: ScoreFile,
    second: ScoreFile,
    sides: tuple[Side, Side],
    scorers: Sequence[str] | None,
    in_loop: set[str],
    level: float,
    draws: int,
    seed: int,
    allow: Iterable[str],
    details: bool = True,
) -> Comparison:
    """:func:`compare` of files that were read, without Holm's correction; ``details`` False leaves out categories and
    parts."""
    if not 0 < level < 1 or draws < MIN_DRAWS:
        raise UserError(f"level must lie between 0 and 1 and draws be at least {MIN_DRAWS}; got {level} and {draws}")
    allowed = set(allow)
    for name in allowed.difference(ALLOW):
        raise UserError(f"unknown difference '{name}' to allow{nearest(name, ALLOW)}")
    names = _common_scorers(first, second, scorers)
    notes = _check_prompts(first, second)
    notes += _check_sampling(*sides, "sampling" in allowed)
    if _seeds_differ(first.rows, second.rows):
        if "seeds" not in allowed:
            raise UserError(
                f"seeds differ between '{first.path}' and '{second.path}': pairs would not start from the same noise; "
                "sample both with the same --seed, or say --allow seeds"
            )
        notes.append("seeds differ between the two sides: pairs do not start from the same noise")
    found = [_one(first, second, name, name in in_loop, level, draws, seed, details) for name in names]
    lost = max(s.dropped for s in found)
    if lost:
        notes.append(f"{lost} prompts were dropped on both sides: an image or a score is missing on one of them")
    return Comparison(
        a=sides[0],
        b=sides[1],
        scorers=found,
        prompts=max(s.overall.prompts for s in found),
        prompts_sha256=first.meta.prompts_sha256,
        level=level,
        draws=draws,
        seed=seed,
        notes=notes,
    )


def with_holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with Holm's correction over all their scorers as one family."""
    flat = [s.overall.sign_p for c in comparisons for s in c.scorers]
    adjusted = iter(holm(flat))
    return [replace(c, scorers=[replace(s, holm_p=next(adjusted)) for s in c.scorers]) for c in comparisons]


def _common_scorers(a: ScoreFile, b: ScoreFile, wanted: Sequence[str] | None) -> list[str]:
    common = [name for name in a.meta.scorers if name in b.meta.scorers]
    for name in wanted or []:
        for side in (a, b):
            if name not in side.meta.scorers:
                raise UserError(f"'{side.path}' has no scores of '{name}'{nearest(name, side.meta.scorers)}")
    names = list(wanted or common)
    if not names:
        ours, theirs = ", ".join(a.meta.scorers), ", ".join(b.meta.scorers)
        raise UserError(f"no scorer in common: '{a.path}' has {ours}, '{b.path}' has {theirs}; score both alike")
    for name in names:
        one, two = a.meta.scorers[name], b.meta.scorers[name]
        odd = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
        if odd:
            what = ", ".join(f"{key} {_brief(one.get(key))} and {_brief(two.get(key))}" for key in odd)
            raise UserError(f"scores of '{name}' are not comparable: {what}; score both sides with one scorer")
        for side in (a, b):
            if len({row.fingerprint for row in side.rows if row.scorer == name}) > 1:
                raise UserError(f"'{side.path}' mixes versions of scorer '{name}'; score it again")
    return names


def _check_prompts(a: ScoreFile, b: ScoreFile) -> list[str]:
    texts_a, texts_b = ({row.id: row.prompt for row in side.rows} for side in (a, b))
    shared = texts_a.keys() & texts_b.keys()
    if not shared:
        raise UserError(f"'{a.path}' and '{b.path}' share no prompt id; sample both models with the same prompt set")
    odd = sorted(i for i in shared if texts_a[i] != texts_b[i])
    if odd:
        raise UserError(
            f"prompt '{odd[0]}' is '{texts_a[odd[0]][:40]}' on one side and '{texts_b[odd[0]][:40]}' on the other "
            f"({len(odd)} differ); the two were made with different prompt lists"
        )
    if a.meta.prompts_sha256 == b.meta.prompts_sha256:
        return []
    only_a, only_b = len(texts_a.keys() - shared), len(texts_b.keys() - shared)
    if only_a and only_b:
        raise UserError(
            f"the prompt lists differ: {only_a} prompts stand only in '{a.path}' and {only_b} only in '{b.path}'; "
            "sample both models with the same prompt set"
        )
    if only_a or only_b:
        return [f"{only_a or only_b} prompts stand in one of the two lists only and are left out"]
    return []


def _check_sampling(a: Side, b: Side, allowed: bool) -> list[str]:
    one, two = (s.sampling.get("settings") or {} for s in (a, b))
    if not isinstance(one, dict) or not isinstance(two, dict) or not one or not two:
        return []
    odd = [key for key in SAME_SETTINGS if one.get(key) != two.get(key)]
    if not odd:
        return []
    what = ", ".join(f"{k} {one.get(k)} and {two.get(k)}" for k in odd)
    if allowed:
        return [f"sampling differs between {a.label} and {b.label}: {what}"]
    raise UserError(
        f"sampling differs between {a.label} and {b.label}: {what}; sample both alike, or say --allow sampling"
    )


def sides_of(files: Sequence[ScoreFile], labels: Sequence[str] | None) -> list[Side]:
    """A side for each file; labels from folders' names where none are given."""
    if labels is None:
        labels = [f.path.parent.name if f.path.stem == "scores" else f.path.stem for f in files]
        if len(set(labels)) < len(labels):
            labels = [f"{f.path.parent.parent.name}/{f.path.parent.name}" for f in files]
        if len(set(labels)) < len(labels):
            labels = [chr(ord("A") + i % 26) + str(i // 26 or "") for i in range(len(files))]
    return [
        Side(label, f.path, f.path.parent / (f.meta.folder or "."), f.meta.sampling)
        for f, label in zip(files, labels, strict=True)
    ]


def _one(
    a: ScoreFile, b: ScoreFile, name: str, in_loop: bool, level: float, draws: int, seed: int, details: bool
) -> ScorerComparison:
    one, two = ({(r.id, r.k): r for r in side.rows if r.scorer == name} for side in (a, b))
    both_k = {k for _, k in one} & {k for _, k in two}
    groups: dict[str, list[int]] = {}
    for identity, k in [*one, *(key for key in two if key not in one)]:
        if k in both_k:
            groups.setdefault(identity, []).append(k)
    pairs: dict[str, list[Pair]] = {}
    parts: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {}
    dropped = 0
    for identity, ks in groups.items():
        rows = [(one.get((identity, k)), two.get((identity, k))) for k in sorted(ks)]
        whole = [(x, y) for x, y in rows if x is not None and y is not None and _scored(x) and _scored(y)]
        if len(whole) < len(rows):
            dropped += 1
            continue
        pairs[identity] = [_pair(x, y) for x, y in whole]
        parts[identity] = [(x.parts, y.parts) for x, y in whole]
    if not pairs:
        raise UserError(f"no prompt has a score of '{name}' on both sides; score the missing images")
    kinds = {identity: found[0].category for identity, found in pairs.items()}
    counts = {kind: list(kinds.values()).count(kind) for kind in dict.fromkeys(kinds.values())}
    strata = list(kinds.values()) if len(counts) > 1 and min(counts.values()) > 1 else None
    categories = {
        str(kind): _paired([found for i, found in pairs.items() if kinds[i] == kind], level, draws, seed)
        for kind in (counts if details and len(counts) > 1 else ())
    }
    part_names = list(next(iter(parts.values()))[0][0]) if details else []
    by_part = {
        key: paired(
            [[x[key] for x, _ in p] for p in parts.values()],
            [[y[key] for _, y in p] for p in parts.values()],
            level,
            draws,
            seed,
            strata,
        )
        for key in part_names
    }
    overall = _paired(list(pairs.values()), level, draws, seed, strata)
    flat = [pair for found in pairs.values() for pair in found]
    return ScorerComparison(name, a.meta.scorers[name], overall, 1.0, categories, by_part, in_loop, dropped, flat)


def _paired(
    groups: Sequence[Sequence[Pair]], level: float, draws: int, seed: int, strata: Sequence[object] | None = None
) -> Paired:
    return paired([[p.a for p in g] for g in groups], [[p.b for p in g] for g in groups], level, draws, seed, strata)


def _pair(x: Row, y: Row) -> Pair:
    assert x.value is not None and y.value is not None
    return Pair(x.id, x.prompt, x.category, x.k, x.image, y.image, x.value, y.value)


def _scored(row: Row) -> bool:
    return row.error is None and row.value is not None


def _seeds_differ(a: Sequence[Row], b: Sequence[Row]) -> bool:
    seeds = {(row.id, row.k): row.seed for row in a}
    return any(row.seed is not None and seeds.get((row.id, row.k), row.seed) not in (row.seed, None) for row in b)


def _brief(value: str | None) -> str:
    return "none" if value is None else value if len(value) <= 24 else value[:12] + "..."
