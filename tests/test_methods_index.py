"""Methods are found by file name; the listing and docs/methods.md say what the classes say; plug-ins join."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from diffalign import methods
from diffalign.errors import UserError
from diffalign.methods import index
from diffalign.methods.base import Method, Paper
from diffalign.methods.preference.dpo import DPO, DPOConfig

ROOT = Path(__file__).parents[1]


def test_index_and_page_are_those_of_the_classes() -> None:
    rows = index.build_index()
    assert json.loads((ROOT / "diffalign/methods/index.json").read_text()) == rows, "run `make index`"
    page = (ROOT / "docs/methods.md").read_text()
    assert index.with_table(page, rows) == page, "run `make index`"


def test_every_method_says_what_it_is() -> None:
    for name in methods.method_modules():
        cls = methods.method_class(name)
        assert isinstance(cls.paper, Paper) and cls.__doc__ and cls.paper.implements
        assert {role for phase in cls.phases for role in phase.trains} == set(cls.roles)
        assert all(field.description for field in cls.Config.model_fields.values())


def test_listing_imports_no_torch() -> None:
    code = "import sys, diffalign as d; d.list_methods(); d.list_recipes(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown method 'dppo'; did you mean 'dpo'"):
        methods.method_class("dppo")


class Plugged(DPO):
    """A method of another package."""


def test_plugins_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("plugged", f"{__name__}:Plugged", "diffalign.methods")
    real = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **k: [point] if k else real())
    assert issubclass(methods.method_class("plugged"), Method)
    assert methods.method_config("plugged") is DPOConfig
    assert methods.list_methods()[-1]["name"] == "plugged"
