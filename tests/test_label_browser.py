"""The labelling page in a real headless browser: keys and clicks end as lines on the disk. `make test-browser`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from small import write_pairs
from test_label import COUNT, lines_of, pairs_of

pytest.importorskip("starlette", reason="needs the extra [label]")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")

from label_server import served  # noqa: E402

from diffalign.labelling.session import Session  # noqa: E402

READY = "!document.getElementById('left').disabled"
LOWEST = "Math.max(...[...document.querySelectorAll('nav button')].map(b => b.getBoundingClientRect().bottom))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield made
    made.close()


def text(name: str) -> str:
    return f"document.getElementById('{name}')?.textContent"


def shown(browser: Browser, count: str) -> None:
    """Wait until so many pairs are done and the next one can be judged."""
    browser.until(f"{text('count')} === {count!r} && {READY}")


def test_keys_end_as_lines_on_the_disk(browser: Browser, tmp_path: Path) -> None:
    found, out = pairs_of(write_pairs(tmp_path / "pairs", COUNT)), tmp_path / "out"
    bob = Session(out, found, "bob")
    for pair in found[:3]:
        bob.vote(pair.id, "tie")
    session = Session(out, found, "ann")
    with served(session) as port:
        browser.look(1280, 800)
        browser.go(f"http://127.0.0.1:{port}/")
        shown(browser, f"0 of {COUNT}")
        light = np.asarray(Image.open(browser.shot(tmp_path / "light.png")).convert("L"))
        assert light.shape == (800, 1280) and light[-1, 0] > 200 and light.std() > 10
        # what stands left on the page is what the line calls left
        sides = [f"document.querySelector('#{side} img').src.split('/').pop()" for side in ("left", "right")]
        first = [browser.value(code) for code in sides]
        assert browser.value(text("prompt")) == found[0].prompt
        browser.press("ArrowLeft")
        shown(browser, f"1 of {COUNT}")
        line = lines_of(out / "votes.jsonl")[-1]
        assert line["vote"] == "left" and [Path(line[side]).stem for side in ("left", "right")] == first
        assert [browser.value(code) for code in sides] != first
        assert "Agreement with bob: 0 % of 1 pairs" in browser.value(text("agreement"))
        for done, key in enumerate(("ArrowRight", "ArrowDown"), 2):
            browser.press(key)
            shown(browser, f"{done} of {COUNT}")
        browser.press("s")
        shown(browser, f"4 of {COUNT}, 1 skipped")
        browser.press("u")
        shown(browser, f"3 of {COUNT}")
        assert browser.value(text("prompt")) == found[3].prompt
        browser.value("document.getElementById('right').click()")
        shown(browser, f"4 of {COUNT}")
        mine = [line for line in lines_of(out / "votes.jsonl") if line["labeller"] == "ann"]
        assert [line["vote"] for line in mine] == ["left", "right", "tie", "skip", "undo", "right"]
        assert len(lines_of(out / "metadata.jsonl")) == 4

        # a second tab votes on the pair that the first one shows
        one, two = browser.tab, browser.open()
        browser.go(f"http://127.0.0.1:{port}/")
        shown(browser, f"4 of {COUNT}")
        browser.press("1")
        shown(browser, f"5 of {COUNT}")
        browser.use(one)
        browser.press("2")
        shown(browser, f"5 of {COUNT}")
        assert "labelled already" in browser.value(text("message"))
        assert [line["vote"] for line in lines_of(out / "votes.jsonl")][-2:] == ["right", "left"]

        # dark, narrow: nothing sticks out, all buttons are on the screen
        browser.look(1280, 800, dark=True)
        assert np.asarray(Image.open(browser.shot(tmp_path / "dark.png")).convert("L"))[-1, 0] < 50
        browser.look(360, 740)
        browser.shot(tmp_path / "narrow.png")
        assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert browser.value(LOWEST) <= 740

        # the end, and back from it
        browser.press("t")
        browser.until(f"{text('count')} === '{COUNT} of {COUNT}' && !document.getElementById('done').hidden")
        browser.press("ArrowLeft")
        browser.shot(tmp_path / "end.png")
        browser.press("Backspace")
        shown(browser, f"5 of {COUNT}")
        assert lines_of(out / "votes.jsonl")[-1]["vote"] == "undo"
        before = (out / "votes.jsonl").read_bytes()
    # the command has ended: the vote is not taken, and the page says so
    browser.press("ArrowLeft")
    browser.until(f"{text('message')}.includes('has ended')")
    browser.shot(tmp_path / "ended.png")
    assert (out / "votes.jsonl").read_bytes() == before
    # started again at the same place: the open page goes on
    with served(Session(out, found, "ann"), port):
        browser.press("ArrowLeft")
        browser.until(f"{text('count')} === '{COUNT} of {COUNT}'")
    assert lines_of(out / "votes.jsonl")[-1]["vote"] == "left"
    assert not [error for error in browser.errors if "409" not in error and "CONNECTION_REFUSED" not in error]
    browser.use(two)


def test_a_missing_picture_can_only_be_skipped(browser: Browser, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", 2)
    found = pairs_of(source)
    (source / "0-b.png").unlink()
    with served(Session(tmp_path / "out", found, "ann")) as port:
        browser.go(f"http://127.0.0.1:{port}/")
        browser.until(f"{text('message')}.includes('skip it')")
        browser.press("ArrowLeft")
        assert browser.value("document.getElementById('left').disabled") is True
        browser.press("s")
        shown(browser, "1 of 2, 1 skipped")
    assert [line["vote"] for line in lines_of(tmp_path / "out" / "votes.jsonl")] == ["skip"]
