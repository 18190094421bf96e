"""Exports for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UserError
from .common import AsJson, app


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run's folder, a LoRA, or a model.", metavar="RUN_OR_MODEL")],
    format: Annotated[
        Literal["diffusers", "kohya", "merged"],
        typer.Option(help="diffusers; kohya: a LoRA for ComfyUI, A1111, Forge; merged: a whole pipeline."),
    ],
    to: Annotated[Path | None, typer.Option("--out", help="Folder; RUN/export/FORMAT if not given.")] = None,
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="A LoRA's own, a pipeline's fp32 if not given.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model under a LoRA, where it is not the one of its run.")
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="student, ema or another network of the last checkpoint; else what model/ holds.")
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload it as this repository.", metavar="USER/NAME")] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    variant: Annotated[str | None, typer.Option(help="Weight files of the model to take, such as fp16.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run or model for other tools, with a card; a LoRA stays a LoRA unless merged."""
    if private and not push_to_hub:
        raise UserError("--private is about a hub repository; add --push-to-hub USER/NAME")
    if push_to_hub:
        from ..hub import check_hub

        check_hub(push_to_hub)
    from ..publish import export_model

    found = export_model(
        model, format, to, dtype=dtype, base=base, role=role, revision=revision, variant=variant, repo=push_to_hub
    )
    address = None
    if push_to_hub:
        from ..hub import push

        address = push(found.folder, push_to_hub, private)
    if as_json:
        facts = {"folder": str(found.folder), "weights": str(found.weights), "format": format, "bytes": found.bytes}
        print(json.dumps({**facts, "hub": address}))
        return
    print(f"{found.weights} ({found.bytes / 2**20:.1f} MiB)" + (f"\n{address}" if address else ""))
