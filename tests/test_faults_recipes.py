"""Mutated recipes: an error is one line of UserError, and nothing is written; what passes is a whole recipe.

The default run takes 300 mutations, ``make test-faults`` 10,000; a share of them goes through the command."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import diffalign

from diffalign.errors import UserError
from diffalign.recipe import Recipe, builtin_recipes, load_recipe

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        10**400,
        -(10**30),
        0.5,
        -0.0,
        1e-320,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *(
        "",
        " ",
        "x",
        "x" * 5000,
        "💥",
        "żółw\u202e",
        "a\0b",
        "true",
        "1e5",
        "0x10",
        "1_000",
        "1:30",
        "~",
        "../..",
        "/",
        "\n\n",
    ),
    *("${oc.env:HOME}", "${model.path}", "${", "${nope}", "???", "{name}", "sd15/dpo", "auto", "*", "%s", "é" * 300),
    *([], {}, [[]], [1, "a", None], {"a": {"b": 1}}, {"": 1}, [{}], [float("nan")], b"\xff\xfe", {1: 2}, {None: 3}),
]
KEYS: list[Any] = ["", " ", "x", "lr", "train", "name", "Train", "tráin", "a.b", 1, 1.5, True, None, "💥", "__class__"]
SCRAPS = [
    *(
        "&a ",
        "*a",
        "*nope",
        "<<: *a",
        "<<: 3",
        "!!python/object/apply:os.system ['touch hacked']",
        "!!set {a}",
        "!!int x",
    ),
    *(
        "\t",
        "\x00",
        "\x07",
        "\ufeff",
        "---\n",
        "...\n",
        "%YAML 9\n",
        "? ",
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        "|",
        ">",
        "@",
    ),
    *(
        "!!binary 'a'",
        "2001-13-45",
        "2001-01-01",
        "1e999",
        "${oc.env:NOPE}",
        "${a:b:c}",
        "${{}}",
        "#",
        "\r",
        "\u2028",
        "\u0085",
    ),
]
LAUGHS = "".join(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}" if i else "ha"] * 6) + "]\n" for i in range(4))

Path_ = tuple[Any, ...]


def places(data: Any, prefix: Path_ = ()) -> list[Path_]:
    """Where every key of a tree stands."""
    found = [prefix] if prefix else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*prefix, key))
    return found


def at(data: Any, path: Path_) -> Any:
    for key in path:
        data = data[key]
    return data


def change_tree(data: dict[str, Any], rng: random.Random) -> None:
    """One fault of types, keys or nesting."""
    path = rng.choice(places(data))
    parent, key = at(data, path[:-1]), path[-1]
    kind = rng.randrange(7)
    if kind <= 2:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 3:
        del parent[key]
    elif kind == 4 and isinstance(parent, dict):
        parent[rng.choice([*KEYS, str(key)[:-1], str(key) + "s", str(key).upper()])] = parent.pop(key)
    elif kind == 5:
        parent[key] = rng.choice([lambda v: [v], lambda v: {key: v}, lambda v: str(v), lambda v: [v] * 3])(parent[key])
    else:
        other = rng.choice(places(data))
        parent[key] = copy.deepcopy(at(data, other))


def change_text(text: str, rng: random.Random) -> str:
    """One fault of the text."""
    place = rng.randrange(len(text) + 1)
    kind, lines = rng.randrange(7), text.split("\n")
    row = rng.randrange(len(lines))
    if kind == 0:
        return text[:place]
    if kind == 1:
        return text[:place] + rng.choice(SCRAPS) + text[place:]
    if kind == 2:
        return text[:place] + chr(rng.choice([rng.randrange(1, 128), rng.randrange(128, 0xD7FF)])) + text[place + 1 :]
    if kind == 3:
        lines.insert(row, lines[rng.randrange(len(lines))])
    elif kind == 4:
        lines[row] = " " * rng.randrange(5) + lines[row].lstrip()
    elif kind == 5:
        head, _, tail = lines[row].partition(":")
        lines[row] = f"{head}: {rng.choice(SCRAPS)}{tail}"
    else:
        lines.insert(row, rng.choice([LAUGHS, "x: &x {y: *x}", "deep: " + "[" * 200 + "]" * 200, "b: " + "{a: " * 60]))
    return "\n".join(lines)


def mutate(text: str, rng: random.Random) -> bytes:
    """A recipe with one to three faults, as bytes of a file."""
    try:
        data = yaml.safe_load(text)
        for _ in range(rng.randrange(3)):
            change_tree(data, rng)
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=rng.random() < 0.5)
    except (yaml.YAMLError, IndexError, ValueError, TypeError, KeyError, AttributeError):
        pass  # a tree that cannot be written: the text as it was
    for _ in range(rng.randrange(3)):
        text = change_text(text, rng)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.03:
        raw = raw[: len(raw) // 2] + bytes([rng.randrange(256)]) + raw[len(raw) // 2 :]
    return rng.choice([raw.decode(errors="replace").encode("utf-16"), raw]) if rng.random() < 0.01 else raw


def sources(only: Callable[[str], bool]) -> list[str]:
    root = resources.files("diffalign.configs")
    return [root.joinpath(f"{name}.yaml").read_text() for name in builtin_recipes() if only(name)]


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_recipes(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng, texts = random.Random(count), sources(lambda name: True)
    file, whole, slowest, refusals = tmp_path / "r.yaml", 0, 0.0, set()
    load_recipe("tiny/dpo")  # its imports are not timed
    began = time.monotonic()
    for number in range(count):
        raw = mutate(rng.choice(texts), rng)
        file.write_bytes(raw)
        start = time.monotonic()
        try:
            recipe = load_recipe(str(file))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, f"{number}: {error}"
            refusals.add(str(error)[:60])
        except BaseException as error:
            raise AssertionError(
                f"mutation {number} of seed {count}: {type(error).__name__}: {error}\n{raw!r}"
            ) from error
        else:
            assert isinstance(recipe, Recipe)
            Recipe.model_validate(recipe.dump())
            whole += 1
        slowest = max(slowest, time.monotonic() - start)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"], "nothing but the recipe is there"
    taken = time.monotonic() - began
    print(
        f"{count} mutated recipes in {taken:.0f} s ({count / taken:.0f} a second, slowest {slowest:.2f} s): "
        f"{whole} valid, {count - whole} refused with {len(refusals)} different lines"
    )
    assert count / 50 < whole < count and len(refusals) > 30


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_mutated_recipes_on_the_command_line(count: int, tiny_model_folder: Path, tmp_path: Path) -> None:
    """With --plan, so that what is valid trains nothing."""
    rng, texts, statuses = random.Random(-count), sources(lambda name: name.startswith("tiny/")), []
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        raw = mutate(rng.choice(texts), rng)
        (folder / "r.yaml").write_bytes(raw)
        done = diffalign("train", folder / "r.yaml", "--plan", code=f"import os; os.chdir({str(folder)!r})")
        assert "Traceback" not in done.out + done.err, (number, raw, done.err)
        assert done.status in (0, 2), (number, raw, done.err)
        if done.status:
            assert done.err.startswith("diffalign: ") and done.err.count("\n") == 1, (number, raw, done.err)
        assert [p.name for p in folder.iterdir()] == ["r.yaml"], (number, raw)
        statuses.append(done.status)
    print(f"{count} through the command: {statuses.count(0)} planned, {statuses.count(2)} refused")
