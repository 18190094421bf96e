"""Re-make the tiny world: ``python -m diffalign.assets.build [--stage NAME] [--out DIR] [--force]``.

Every stage runs by step counts with fixed seeds on one thread; two stages run side by side, so two cores are used. A
stage whose output exists is skipped. The last stage measures the result and exits 1 if a quality gate fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import scenes

HERE = Path(__file__).resolve().parent
INDEX = "model_index.json"


@dataclass(frozen=True)
class World:
    """Where things are. ``work`` holds what is not shipped (samples, snapshots, timings)."""

    root: Path
    bpe: Path | None = None

    @property
    def work(self) -> Path:
        return self.root.parent / "build" / f"{self.root.name}-work"

    @property
    def vae(self) -> Path:
        """The autoencoder as trained, or (in a checkout without the work folder) the shipped one."""
        trained = self.work / "vae"
        return trained if (trained / "config.json").exists() else self.root / "tiny-sd" / "vae"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tiny-sd" / "tokenizer"


def _tokenizer(w: World) -> None:
    from . import tokenizer

    if w.bpe is not None:
        tokenizer.make(w.tokenizer, w.bpe)
    elif w.tokenizer != HERE / "tiny-sd" / "tokenizer":
        shutil.copytree(HERE / "tiny-sd" / "tokenizer", w.tokenizer, dirs_exist_ok=True)
    elif not w.tokenizer.exists():
        raise SystemExit("the tokenizer is missing: give --bpe PATH of bpe_simple_vocab_16e6.txt.gz")


def _oracle(w: World) -> None:
    from . import train_oracle

    train_oracle.train(w.root / "tiny-oracle")


def _vae(w: World) -> None:
    from . import train_vae

    train_vae.train(w.work / "vae")


def _unet(w: World) -> None:
    from . import train_unet

    train_unet.train(w.work / "unet", w.tokenizer, w.vae, w.work / "snapshot")


def _refine(w: World) -> None:
    from diffalign.eval.oracle import Oracle

    from . import train_unet

    oracle = Oracle.from_pretrained(str(w.root / "tiny-oracle"))  # says when to stop; it teaches nothing
    first, second = train_unet.COURSES
    train_unet.refine(w.work / "refined", w.work / "unet", w.vae, first, oracle)
    train_unet.refine(w.root / "tiny-sd", w.work / "refined", w.vae, second, oracle)


def _clip(w: World) -> None:
    from . import train_clip

    train_clip.train_clip(w.root / "tiny-clip", w.tokenizer, w.vae)


def _pickscore(w: World) -> None:
    from . import train_clip

    train_clip.train_pickscore(w.root / "tiny-pickscore", w.root / "tiny-clip", w.vae)


def _sdxl(w: World) -> None:
    from . import train_sdxl

    train_sdxl.train(w.root / "tiny-sdxl", w.root / "tiny-sd", w.root / "tiny-pickscore")


def _hps(w: World) -> None:
    from . import train_hps

    train_hps.train(w.root / "tiny-hps", w.root / "tiny-clip", w.vae)


def _samples(w: World) -> None:
    from . import make_pairs

    make_pairs.make_samples(w.work / "samples.npz", w.root / "tiny-sd")


def _pairs(w: World) -> None:
    from . import make_pairs

    make_pairs.make_pairs(w.root / "tiny-pairs", w.work / "samples.npz", w.root / "tiny-pickscore")


def _ranked(w: World) -> None:
    from . import make_ranked

    make_ranked.make_ranked(w.root, w.work / "ranked")


def _prompts(w: World) -> None:
    folder = w.root / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "heldout": scenes.heldout_prompts(),
        "single": scenes.single_prompts(),
        "train": scenes.training_prompts(),
    }
    for name, prompts in sets.items():
        rows = []
        for i, prompt in enumerate(prompts):
            scene = scenes.parse(prompt)
            assert scene is not None
            rows.append({"id": f"{name}-{i:04d}", "prompt": prompt, "category": scene.axis})
        (folder / f"tiny-{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def _check(w: World) -> None:
    from . import quality

    if not quality.check(w.root):
        raise SystemExit(1)


@dataclass(frozen=True)
class Stage:
    run: Callable[[World], None]
    after: tuple[str, ...]
    output: Callable[[World], Path]


def _either(path: Path, later: Path) -> Path:
    """A work file is not missed once what was made from it is there."""
    return path if path.exists() else later


STAGES: dict[str, Stage] = {
    "tokenizer": Stage(_tokenizer, (), lambda w: w.tokenizer / "tokenizer.json"),
    "prompts": Stage(_prompts, (), lambda w: w.root / "prompts" / "tiny-train.jsonl"),
    "vae": Stage(_vae, (), lambda w: w.vae / "config.json"),
    "oracle": Stage(_oracle, (), lambda w: w.root / "tiny-oracle" / "config.json"),
    "unet": Stage(_unet, ("tokenizer", "vae"), lambda w: _either(w.work / "unet", w.root / "tiny-sd") / INDEX),
    "refine": Stage(_refine, ("unet", "oracle"), lambda w: w.root / "tiny-sd" / INDEX),
    "clip": Stage(_clip, ("tokenizer", "vae"), lambda w: w.root / "tiny-clip" / "model.safetensors"),
    "pickscore": Stage(_pickscore, ("clip",), lambda w: w.root / "tiny-pickscore" / "model.safetensors"),
    "sdxl": Stage(_sdxl, ("refine", "pickscore"), lambda w: w.root / "tiny-sdxl" / INDEX),
    "hps": Stage(_hps, ("clip",), lambda w: w.root / "tiny-hps" / "open_clip_model.safetensors"),
    "samples": Stage(
        _samples, ("refine",), lambda w: _either(w.work / "samples.npz", w.root / "tiny-pairs" / "pickapic.parquet")
    ),
    "pairs": Stage(_pairs, ("samples", "pickscore"), lambda w: w.root / "tiny-pairs" / "pickapic.parquet"),
    "ranked": Stage(
        _ranked, ("refine", "pickscore", "hps", "prompts"), lambda w: w.root / "tiny-ranked" / "ranked.parquet"
    ),
    "check": Stage(_check, ("pairs", "ranked", "oracle", "prompts", "hps", "sdxl"), lambda w: w.root / "QUALITY.json"),
}


def build(world: World, lanes: int = 2, force: bool = False) -> None:
    """Run all stages as processes of one thread each, at most ``lanes`` at a time, in the order of their needs."""
    world.work.mkdir(parents=True, exist_ok=True)
    done = {name for name, s in STAGES.items() if not force and s.output(world).exists()}
    for name in sorted(done):
        print(f"{name}: there already, skipped", flush=True)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    command = [sys.executable, "-m", __spec__.name if __spec__ else "diffalign.assets.build", "--out", str(world.root)]
    command += ["--bpe", str(world.bpe)] if world.bpe else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    while len(done) < len(STAGES):
        for name, stage in STAGES.items():
            if name not in done and name not in running and done.issuperset(stage.after) and len(running) < lanes:
                running[name] = (subprocess.Popen([*command, "--stage", name], env=env), time.time())
                print(f"{name}: started", flush=True)
        time.sleep(0.5)
        for name, (process, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode:
                for other, _ in running.values():
                    other.terminate()
                raise SystemExit(f"{name}: failed with status {process.returncode}")
            print(f"{name}: done in {time.time() - began:.0f} s", flush=True)
            done.add(name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffalign.assets.build", description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=list(STAGES), help="run this stage alone, here, even if its output exists")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the assets (default: the package's own)")
    parser.add_argument("--bpe", type=Path, help="bpe_simple_vocab_16e6.txt.gz, to cut the tokenizer again")
    parser.add_argument("--lanes", type=int, default=2, help="stages at a time, one thread each")
    parser.add_argument("--force", action="store_true", help="make every stage again")
    args = parser.parse_args()
    world = World(args.out.resolve(), args.bpe)
    if args.stage:
        STAGES[args.stage].run(world)
    else:
        build(world, args.lanes, args.force)


if __name__ == "__main__":
    main()
