"""``python -m diffalign.methods.index``: writes index.json from the classes, so that listings import no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import method_class, method_modules


def build_index() -> list[dict[str, Any]]:
    """One row a method, from its class."""
    rows = []
    for name, module in method_modules().items():
        cls = method_class(name)
        schema = cls.Config.model_json_schema()["properties"] if cls.Config.model_fields else {}
        rows.append(
            {
                "name": name,
                "group": module.split(".")[-2],
                "title": cls.paper.title,
                "arxiv": cls.paper.arxiv,
                "implements": cls.paper.implements,
                "differs": cls.paper.differs,
                "needs": cls.needs.batch,
                "roles": list(cls.roles),
                "phases": [phase.name for phase in cls.phases],
                "options": {
                    key: {"default": value.get("default"), "help": value.get("description", "")}
                    for key, value in schema.items()
                },
            }
        )
    return rows


if __name__ == "__main__":
    Path(__file__).with_name("index.json").write_text(json.dumps(build_index(), indent=1) + "\n")
