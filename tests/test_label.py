"""``pairs label`` without its page: what is dealt, what a vote leaves on the disk, agreement, damaged files."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from command import diffalign
from small import log_of, picture, settings, write_pairs

from diffalign.data.readers import read_pairs
from diffalign.errors import Note, RunError, UserError
from diffalign.labelling.agreement import agreement, cohen_kappa, krippendorff_alpha, raw_agreement
from diffalign.labelling.candidates import Pair, read_candidates, rounds
from diffalign.labelling.session import Refused, Session, Summary
from diffalign.labelling.votes import Vote, VoteFile, check_name
from diffalign.recipe import DataRecipe

COUNT = 6


def pairs_of(path: Path | str, per_prompt: int | None = None, **data: Any) -> list[Pair]:
    return read_candidates(DataRecipe(path=str(path), **{"ties": "keep", "cache": False, **data}), per_prompt)[0]


def write_samples(folder: Path, prompts: int, each: int, first: int = 0) -> Path:
    """Pictures and a manifest as `diffalign sample` leaves them."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(prompts):
        for k in range(each):
            name = f"images/{i:06d}-{k}.png"
            picture(first + i * each + k).save(folder / name)
            lines.append(json.dumps({"id": f"p{i}", "prompt": f"thing {i}", "k": k, "seed": 0, "image": name}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    return pairs_of(write_pairs(tmp_path_factory.mktemp("source") / "pairs", COUNT))


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def vote_all(session: Session, votes: list[str]) -> None:
    for vote in votes:
        shown = session.state().pair
        assert shown is not None
        session.vote(shown.id, vote)


def side_of(session: Session, pair: Pair, digest: str) -> str:
    """The vote that takes a picture of a pair, wherever this labeller sees it."""
    return "left" if session._shown(pair).left == digest else "right"


# ---- agreement, by hand --------------------------------------------------------------------------------------------


def test_cohen_kappa_of_hand_numbers() -> None:
    """45 both yes, 15 both no, 15 and 25 apart: p_o 0.6; p_e = 0.6 * 0.7 + 0.4 * 0.3 = 0.54; kappa 0.06 / 0.46."""
    table = [("y", "y")] * 45 + [("y", "n")] * 15 + [("n", "y")] * 25 + [("n", "n")] * 15
    first, second = zip(*table, strict=True)
    assert cohen_kappa(first, second) == pytest.approx(0.06 / 0.46)
    assert cohen_kappa("ab", "ba") == pytest.approx(-1)
    assert cohen_kappa("aa", "aa") is None and cohen_kappa("", "") is None


def test_krippendorff_alpha_of_hand_numbers() -> None:
    """Three raters with gaps, Krippendorff's own example: nominal alpha 0.691."""
    raters = ["*****34121133*3", "1*213343*******", "**21344*21133*4"]
    units = ["".join(mark for mark in column if mark != "*") for column in zip(*raters, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.691, abs=5e-4)
    # two raters, ab ab aa bb: D_o = 4 / 8, D_e = 2 * 4 * 4 / (8 * 7)
    assert krippendorff_alpha(["ab", "ab", "aa", "bb"]) == pytest.approx(1 - 0.5 / (32 / 56))
    assert krippendorff_alpha(["aa", "aa"]) is None and krippendorff_alpha(["a", "b"]) is None


def test_raw_agreement_and_the_whole() -> None:
    assert raw_agreement(["aa", "ab", "aab", "c"]) == pytest.approx((1 + 0 + 1 / 3) / 3)
    found = agreement({"p": {"ann": "first", "bob": "first"}, "q": {"ann": "tie", "bob": "second"}, "r": {"cy": "tie"}})
    assert (found.pairs, found.share, found.alpha) == (2, 0.5, pytest.approx(1 - (2 / 4) / (10 / 12)))
    ((one, other, pairs, share, kappa),) = found.kappas
    assert (one, other, pairs, share, kappa) == ("ann", "bob", 2, 0.5, pytest.approx((0.5 - 0.25) / 0.75))


# ---- what is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_rounds_deal_every_pair_once_and_evenly(count: int) -> None:
    dealt = [tuple(sorted(pair)) for pair in rounds(count)]
    assert sorted(dealt) == list(combinations(range(count), 2))
    for end in range(count // 2, len(dealt) + 1, count // 2):
        seen = Counter(thing for pair in dealt[:end] for thing in pair)
        assert max(seen.values()) - min(seen[thing] for thing in range(count)) <= 1


def test_samples_of_several_models_are_dealt_prompt_by_prompt(tmp_path: Path) -> None:
    write_samples(tmp_path / "all" / "base", prompts=3, each=2)
    write_samples(tmp_path / "all" / "mine", prompts=3, each=1, first=100)
    found = pairs_of(tmp_path / "all")
    assert Counter(pair.prompt for pair in found) == {"thing 0": 3, "thing 1": 3, "thing 2": 3}
    assert [pair.prompt for pair in found[:3]] == ["thing 0", "thing 1", "thing 2"], "one of each prompt first"
    assert pairs_of(tmp_path / "all") == found
    few = pairs_of(tmp_path / "all", per_prompt=1)
    assert few == found[:3]
    assert len(pairs_of(tmp_path / "all" / "base")) == 3, "a folder of one model"
    # an equal picture of another model is no picture to choose from
    write_samples(tmp_path / "all" / "copy", prompts=3, each=2)
    assert {pair.id for pair in pairs_of(tmp_path / "all")} == {pair.id for pair in found}


def test_pairs_and_lists_and_parquet(tmp_path: Path, candidates: list[Pair]) -> None:
    assert len(candidates) == COUNT and len({pair.id for pair in candidates}) == COUNT
    assert len(pairs_of("tiny-ranked", max_pairs=2)) > 2, "lists are dealt"
    picked = pairs_of("tiny-pairs/pickapic.parquet", max_pairs=3)
    assert len(picked) == 3, "pictures inside a table"
    session = Session(tmp_path / "out", picked, "ann")
    vote_all(session, ["left", "right", "tie"])
    rows = read_pairs(DataRecipe(path=str(tmp_path / "out"), ties="keep", cache=False)).rows
    assert {row.chosen.digest for row in rows} <= {ref.digest for pair in picked for ref in pair.pictures}


def test_equal_pictures_are_no_pair_and_other_pairs_votes_do_not_count(tmp_path: Path, candidates: list[Pair]) -> None:
    source = write_pairs(tmp_path / "source", 3)
    (source / "1-b.png").write_bytes((source / "1-a.png").read_bytes())
    assert len(pairs_of(source)) == len(pairs_of(source, duplicates="keep")) == 2
    vote_all(Session(tmp_path / "out", candidates, "ann"), ["left", "skip", "tie"])
    state = Session(tmp_path / "out", candidates[1:3], "ann").state()  # the source has less by now
    assert (state.done, state.total, state.skipped, state.last) == (2, 2, 1, candidates[2].id)


def test_nothing_to_choose_from(tmp_path: Path) -> None:
    one = write_samples(tmp_path / "one", prompts=2, each=1)
    with pytest.raises(UserError, match=r"no prompt in .* has two different pictures; draw more"):
        pairs_of(one)
    with pytest.raises(UserError, match=r"data\.streaming"):
        pairs_of(one, streaming=True)


def test_sides_are_keyed_by_labeller_and_pair(tmp_path: Path) -> None:
    many = pairs_of(write_samples(tmp_path / "s", prompts=4, each=5))
    sessions = [Session(tmp_path / f"{n}", many, labeller) for n, labeller in enumerate(("ann", "ann", "bob"))]
    sides = [[session._shown(pair).left == pair.pictures[0].digest for pair in many] for session in sessions]
    assert sides[0] == sides[1] != sides[2]
    assert all(0.25 < sum(each) / len(many) < 0.75 for each in sides)


# ---- what is kept --------------------------------------------------------------------------------------------------


def test_votes_become_lines_and_pairs_at_once(tmp_path: Path, candidates: list[Pair]) -> None:
    session = Session(tmp_path, candidates, "ann")
    assert session.state().pair is not None and session.state().total == COUNT
    for place, vote in enumerate(["left", "right", "tie", "skip"]):
        shown = session.state().pair
        assert shown is not None and shown.id == candidates[place].id
        state = session.vote(shown.id, vote)
        line = lines_of(tmp_path / "votes.jsonl")[-1]
        assert (line["labeller"], line["pair"], line["vote"], line["prompt"]) == ("ann", shown.id, vote, shown.prompt)
        assert [Path(line[side]).stem for side in ("left", "right")] == [shown.left, shown.right]
        assert (state.done, state.skipped, state.last) == (place + 1, vote == "skip", shown.id)
        rows = lines_of(tmp_path / "metadata.jsonl")
        assert len(rows) == min(place + 1, 3), "a skip is no pair"
        if vote in ("left", "right"):
            assert Path(rows[-1]["chosen"]).stem == getattr(shown, vote)
    assert [row.get("tie", False) for row in rows] == [False, False, True]
    found = read_pairs(DataRecipe(path=str(tmp_path), cache=False))
    assert (found.report.usable, found.report.counts) == (2, {"tie": 1})
    assert not list(tmp_path.rglob("*.tmp"))
    # the same command again goes on
    state = Session(tmp_path, candidates, "ann").state()
    assert state.done == 4 and state.pair is not None and state.pair.id == candidates[4].id


def test_undo_is_another_line(tmp_path: Path, candidates: list[Pair]) -> None:
    session = Session(tmp_path, candidates, "ann")
    vote_all(session, ["left", "skip"])
    before = (tmp_path / "votes.jsonl").read_bytes()
    first, second = candidates[:2]
    state = session.undo(second.id)
    assert state.pair is not None and (state.pair.id, state.done, state.last) == (second.id, 1, first.id)
    session.undo(first.id)
    after = (tmp_path / "votes.jsonl").read_bytes()
    assert (
        after.startswith(before) and [line["vote"] for line in lines_of(tmp_path / "votes.jsonl")[2:]] == ["undo"] * 2
    )
    assert (tmp_path / "metadata.jsonl").read_bytes() == b"" and session.state().last is None
    with pytest.raises(Refused, match="another vote is the last one"):
        session.undo(first.id)
    session.vote(first.id, "right")
    assert Session(tmp_path, candidates, "ann").state().done == 1


def test_several_labellers_at_once(tmp_path: Path, candidates: list[Pair]) -> None:
    """Two processes' sessions over one file see each other's votes; the pair is what most say."""
    ann, bob = Session(tmp_path, candidates, "ann"), Session(tmp_path, candidates, "bob")
    first, second, third = candidates[:3]
    liked = [pair.pictures[0].digest for pair in candidates]
    ann.vote(first.id, side_of(ann, first, liked[0]))
    bob.vote(first.id, side_of(bob, first, liked[0]))
    ann.vote(second.id, side_of(ann, second, liked[1]))
    bob.vote(second.id, "tie")
    ann.vote(third.id, "skip")
    state = bob.vote(third.id, side_of(bob, third, liked[2]))
    assert state.kappas == (("ann", "bob", 2, 0.5, pytest.approx(0.0)),)
    rows = {row["id"]: row for row in lines_of(tmp_path / "metadata.jsonl")}
    assert rows[first.id]["votes"] == [2, 0, 0] and Path(rows[first.id]["chosen"]).stem == liked[0]
    assert rows[second.id]["tie"] is True and sorted(rows[second.id]["votes"]) == [0, 1, 1], "level is a tie"
    assert rows[third.id]["votes"] == [1, 0, 0]
    cy = Session(tmp_path, candidates, "cy")
    cy.vote(second.id, side_of(cy, second, liked[1]))
    rows = {row["id"]: row for row in lines_of(tmp_path / "metadata.jsonl")}
    assert "tie" not in rows[second.id] and rows[second.id]["votes"] == [2, 0, 1]
    whole = read_pairs(DataRecipe(path=str(tmp_path / "labellers.jsonl"), ties="keep", duplicates="keep", cache=False))
    assert Counter(row.user for row in whole.rows) == {"ann": 2, "bob": 3, "cy": 1}
    summary = Summary.of(VoteFile(tmp_path))
    assert (summary.pairs, summary.ties, summary.agreement.pairs) == (3, 0, 2)
    assert summary.labellers["ann"]["skip"] == 1 and list(summary.labellers) == ["ann", "bob", "cy"]


def test_each_labellers_own_rows_and_agreement(tmp_path: Path, candidates: list[Pair]) -> None:
    """Whoever likes the second picture has it chosen, wherever it stood; a labeller sees only his own agreements."""
    pair = candidates[0]
    one, other = (ref.digest for ref in pair.pictures)
    for name, liked in (("ann", one), ("bob", other), ("cy", other)):
        session = Session(tmp_path, candidates, name)
        state = session.vote(pair.id, side_of(session, pair, liked))
    rows = {row["user"]: row for row in lines_of(tmp_path / "labellers.jsonl")}
    found = {name: (Path(row["chosen"]).stem, Path(row["rejected"]).stem) for name, row in rows.items()}
    assert found == {"ann": (one, other), "bob": (other, one), "cy": (other, one)}
    (row,) = lines_of(tmp_path / "metadata.jsonl")
    assert Path(row["chosen"]).stem == other and row["votes"] == [2, 1, 0]
    assert [kappa[:4] for kappa in state.kappas] == [("ann", "cy", 1, 0.0), ("bob", "cy", 1, 1.0)]
    session.undo(pair.id)  # his own vote alone
    assert {row["user"] for row in lines_of(tmp_path / "labellers.jsonl")} == {"ann", "bob"}
    assert lines_of(tmp_path / "votes.jsonl")[-1]["labeller"] == "cy"
    assert Summary.of(VoteFile(tmp_path)).ties == 1


def test_two_tabs_cannot_vote_twice(tmp_path: Path, candidates: list[Pair]) -> None:
    tabs = [Session(tmp_path, candidates, "ann") for _ in range(4)]  # as processes: nothing in memory is shared
    refused: list[str] = []

    def work(session: Session) -> None:
        for pair in candidates:
            try:
                session.vote(pair.id, "left")
            except Refused as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work, args=(tab,)) for tab in tabs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line["pair"] for line in lines_of(tmp_path / "votes.jsonl")] == [pair.id for pair in candidates]
    assert len(refused) == 3 * COUNT and "labelled already" in refused[0]
    assert len(lines_of(tmp_path / "metadata.jsonl")) == COUNT


def test_what_a_page_cannot_ask_for(tmp_path: Path, candidates: list[Pair]) -> None:
    session = Session(tmp_path, candidates, "ann")
    for pair, vote in (("0" * 16, "left"), (candidates[0].id, "best"), (candidates[0].id, "undo")):
        with pytest.raises(Refused, match="no such pair or vote"):
            session.vote(pair, vote)
    with pytest.raises(Refused, match="no such picture"):
        session.picture("../votes")
    assert (tmp_path / "votes.jsonl").read_bytes() == b""


def test_a_picture_that_changed_is_not_labelled(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", 2)
    found = pairs_of(source)
    session = Session(tmp_path / "out", found, "ann")
    picture(77).save(source / "0-a.png")
    with pytest.raises(Refused, match=r"0-a\.png' changed meanwhile"):
        session.vote(found[0].id, "left")
    (source / "0-a.png").unlink()
    with pytest.raises(Refused, match="does not exist; skip this pair"):
        session.vote(found[0].id, "tie")
    assert (tmp_path / "out" / "votes.jsonl").read_bytes() == b""
    assert session.vote(found[0].id, "skip").done == 1
    # votes outlive the source
    session.vote(found[1].id, "left")
    (source / "1-a.png").unlink()
    assert len(read_pairs(DataRecipe(path=str(tmp_path / "out"), cache=False)).rows) == 1


def test_a_full_disk_leaves_no_half_line(
    tmp_path: Path, candidates: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tmp_path, candidates, "ann")
    vote_all(session, ["left"])
    before = (tmp_path / "votes.jsonl").read_bytes()
    with monkeypatch.context() as patch:

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("diffalign.labelling.votes.os.fsync", full)
        with session.file.changing(), pytest.raises(RunError, match=r"not written to .*No space left"):
            session.file.add(Vote("ann", "x", "left", "p", "images/a.png", "images/b.png"))
    assert (tmp_path / "votes.jsonl").read_bytes() == before
    vote_all(session, ["right"])
    assert [line["vote"] for line in lines_of(tmp_path / "votes.jsonl")] == ["left", "right"]


# ---- edited by hand ------------------------------------------------------------------------------------------------


def replaced(old: str, new: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [lines[0], lines[1].replace(old, new), *lines[2:]]


BAD: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "torn": (lambda lines: [*lines[:2], lines[2][:40]], "line 3 is torn or no JSON"),
    "no object": (lambda lines: [lines[0], "[1]", *lines[2:]], r"line 2 is no object \{...\}"),
    "vote": (
        replaced('"vote": "right"', '"vote": "rigth"'),
        "line 2 has the vote 'rigth', which is none of left, right, tie, skip, undo",
    ),
    "missing": (replaced('"labeller": "ann", ', ""), "line 2 has no text 'labeller'"),
    "prompt": (
        replaced('"prompt": "', '"prompt": "not '),
        "line 2 names a prompt or pictures that are not those of its",
    ),
    "path": (replaced('"images/', '"../images/'), "line 2 names a prompt or pictures that are not those of its pair"),
    "twice": (lambda lines: [*lines, lines[0]], "line 4 is a second vote of ann on the pair of line 1"),
    "undo": (
        lambda lines: [*lines, '{"labeller": "ann", "pair": "x", "vote": "undo"}'],
        "line 4 takes back a vote of ann that does not stand",
    ),
    "two": (lambda lines: ["{", *lines, "}"], "line 1 is torn.*; 1 more lines are wrong, too"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_line_is_named_and_nothing_is_lost(case: str, tmp_path: Path, candidates: list[Pair]) -> None:
    session = Session(tmp_path, candidates, "ann")
    vote_all(session, ["left", "right", "tie"])
    file = tmp_path / "votes.jsonl"
    change, message = BAD[case]
    whole = file.read_text()
    file.write_text("\n".join(change(whole.splitlines())))
    damaged, rows = file.read_bytes(), (tmp_path / "metadata.jsonl").read_bytes()
    with pytest.raises(UserError, match=message) as found:
        Session(tmp_path, candidates, "ann")
    assert "delete it (a line is one vote; the others stay)" in str(found.value)
    with pytest.raises(UserError, match=message):  # a page that is open while somebody edits
        session.vote(candidates[3].id, "left")
    assert file.read_bytes() == damaged and (tmp_path / "metadata.jsonl").read_bytes() == rows
    file.write_text(whole)
    assert session.vote(candidates[3].id, "left").done == 4


def test_sound_edits_are_taken(tmp_path: Path, candidates: list[Pair]) -> None:
    """A vote turned round, a line taken out, empty lines, the last line left open."""
    session = Session(tmp_path, candidates, "ann")
    vote_all(session, ["left", "right", "tie"])
    file, before = tmp_path / "votes.jsonl", lines_of(tmp_path / "metadata.jsonl")
    first, _, third = file.read_text().splitlines()
    file.write_text(first.replace('"vote": "left"', '"vote": "right"') + "\n\n" + third)
    with pytest.warns(Note, match=r"made anew from the votes; what it was is kept as metadata-1\.jsonl"):
        again = Session(tmp_path, candidates, "ann")
    rows = lines_of(tmp_path / "metadata.jsonl")
    assert (rows[0]["chosen"], rows[0]["rejected"]) == (before[0]["rejected"], before[0]["chosen"])
    assert len(rows) == 2 and lines_of(tmp_path / "metadata-1.jsonl") == before
    again.vote(candidates[1].id, "left")
    assert [line["vote"] for line in map(json.loads, filter(None, file.read_text().split("\n")))] == [
        "right",
        "tie",
        "left",
    ]


def test_foreign_folders_and_names(tmp_path: Path, candidates: list[Pair]) -> None:
    write_pairs(tmp_path / "other", 2)
    with pytest.raises(UserError, match="holds pairs that this command did not make"):
        Session(tmp_path / "other", candidates, "ann")
    assert not (tmp_path / "other" / "votes.jsonl").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Session(tmp_path / "file", candidates, "ann")
    for name in ("", "  ", "a\nb", "x" * 65):
        with pytest.raises(UserError, match="is no name"):
            check_name(name)


# ---- training and the command --------------------------------------------------------------------------------------


def test_training_reads_what_was_labelled(tmp_path: Path, tiny_model_folder: Path) -> None:
    out = tmp_path / "labelled"
    vote_all(
        Session(out, pairs_of(write_pairs(tmp_path / "source", 8)), "ann"), ["left", "right"] * 3 + ["tie", "skip"]
    )
    assert len(read_pairs(DataRecipe(path=str(out), ties="skip", cache=False)).rows) == 6
    asked = settings(tiny_model_folder, out, tmp_path / "run", train__steps=2, train__log_every=1, data__ties="keep")
    done = diffalign("train", *asked)
    assert done.status == 0, done.err
    assert len(log_of(tmp_path / "run")) == 2 and (tmp_path / "run" / "model").is_dir()
    assert "7 usable" in done.err + done.out, done.err


def test_labels_reach_online_methods_by_a_preference_model(tmp_path: Path, tiny_model_folder: Path) -> None:
    """A person's votes train SPO's judge, which D3PO then asks about samples of its own."""
    out = tmp_path / "labelled"
    vote_all(Session(out, pairs_of(write_pairs(tmp_path / "source", 6)), "ann"), ["left", "right"] * 3)
    judge, few = tmp_path / "judge", {"train__steps": 2, "train__log_every": 1, "method__beta": None}
    few |= {"model__lora__rank": None, "model__lora__alpha": None}
    _, *asked = settings(tiny_model_folder, out, judge, **few, validate__pairs=0)
    done = diffalign("train", "tiny/spm", *asked, "data.max_pairs=6")
    assert done.status == 0, done.err
    rounds = {"method__reward": f"spm={judge}", "method__steps": 3, "method__guidance": 1.0, "method__members": 3}
    changes = few | rounds | {"method__beta": 10, "validate__pairs": 0, "model__lora__rank": 4}
    _, *asked = settings(tiny_model_folder, out, tmp_path / "run", **changes)
    done = diffalign("train", "tiny/d3po", *asked)
    assert done.status == 0, done.err
    rows = log_of(tmp_path / "run")
    assert len(rows) == 2 and all(row["reward_spread"] > 0 for row in rows)
    assert rows[0]["grad_norm/student"] > 0


def test_report_and_refusals(tmp_path: Path, candidates: list[Pair]) -> None:
    for name in ("ann", "bob"):
        vote_all(Session(tmp_path / "out", candidates, name), ["left", "tie", "skip"])
    done = diffalign("pairs", "label", tmp_path / "out", "--report", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["labellers"]["bob"] == {"left": 1, "right": 0, "tie": 1, "skip": 1} and found["pairs"] == 2
    shown = diffalign("pairs", "label", tmp_path / "out", "--report")
    assert "agreement on 2 pairs that several labelled" in shown.out and "Cohen's kappa" in shown.out

    line = diffalign("pairs", "label", tmp_path, "--report").line
    assert "holds no votes.jsonl" in line
    assert "DST is missing" in diffalign("pairs", "label", "tiny-pairs").line
    with open(tmp_path / "out" / "votes.jsonl", "a") as file:
        file.write('{"time": "2026')
    damaged = diffalign("pairs", "label", "tiny-pairs", tmp_path / "out", "data.max_pairs=2", "--labeller", "ann")
    assert damaged.status == 2 and "votes.jsonl' line 7 is torn or no JSON" in damaged.err
    assert os.path.getsize(tmp_path / "out" / "metadata.jsonl")


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u\nf = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'uvicorn' else f(name, *more)"
    )
    done = diffalign("pairs", "label", "tiny-pairs", tmp_path / "out", code=code)
    assert done.status == 2 and "the labelling page needs uvicorn: pip install 'diffalign[label]'" in done.line
    assert not (tmp_path / "out").exists()
