"""A run from start to finish: folder, resume, steps, validation, checkpoints, interrupts, export, report."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from .checkpoint import checkpoint_dirs, load_checkpoint, prune, save_checkpoint, write_atomic
from .console import Console
from .errors import Interrupted, RunError, UserError
from .export import export_run
from .guards import Alarm, Guards, advice
from .meter import RunLog, check_trackers, read_log
from .optim import check_optimizer
from .pictures import Sheets
from .recipe import Recipe
from .setup import Parts, build, check_same_recipe
from .validate import BestKeeper, heldout_metrics

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class Run:
    """What a training run left behind.

    ``dir`` is the run's folder; ``model`` what ``from_pretrained`` (full) or ``load_lora_weights`` (adapters) takes;
    ``log`` the rows of ``log.jsonl``; ``report`` the HTML page; ``step`` the last step done.
    """

    dir: Path
    recipe: Recipe
    step: int
    log: list[dict[str, Any]] = field(repr=False, default_factory=list)

    @property
    def model(self) -> Path:
        """Folder of the trained weights."""
        return self.dir / "model"

    @property
    def report(self) -> Path:
        """The run's HTML report."""
        return self.dir / "report.html"

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return checkpoint_dirs(self.dir / "checkpoints")

    def curve(self, name: str, kind: str = "train") -> list[tuple[int, float]]:
        """(step, value) of one logged number, such as ``accuracy`` or, with kind="validate", ``loss``."""
        return [(row["step"], row[name]) for row in self.log if row["kind"] == kind and name in row]

    def pipeline(self, **options: Any) -> DiffusionPipeline:
        """The trained model as a diffusers pipeline: plain, or a student's that draws as it was distilled.

        Raises UserError where the run trained a preference model."""
        from .facts import recorded

        if (self.model / "step_aware.safetensors").is_file():
            raise UserError(
                f"'{self.dir}' trained a preference model, which makes no pictures; score with it: "
                f"--scorers spm={self.dir}"
            )
        pipe, record = self._plain_pipeline(**options), recorded(str(self.model))
        if record is None:
            return pipe
        from .pipelines.few_step import FewStepPipeline

        return FewStepPipeline.of(pipe, record)

    def _plain_pipeline(self, **options: Any) -> DiffusionPipeline:
        from diffusers import AutoencoderKL, DiffusionPipeline

        from .families import detect, fetch
        from .families.extras import extra_header, find_extra
        from .families.guidance import GuidanceAdapters
        from .families.lora import find_lora, load_lora
        from .pipelines.distilled_guidance import DistilledGuidancePipeline
        from .pipelines.extras import apply_extra

        model = self.recipe.model
        if model.storage == "copies":
            return DiffusionPipeline.from_pretrained(self.model, **options)
        base, _ = detect(model)
        fetch(base, model.revision)
        if "vae" in base.replaced:
            options.setdefault("vae", AutoencoderKL.from_pretrained(base.part("vae")))
        pipe = DiffusionPipeline.from_pretrained(base.path, **{"variant": base.variant, **options})
        for lora in model.loras:
            pipe.load_lora_weights(str(find_lora(lora.path, lora.weight_name)))
            pipe.fuse_lora(lora_scale=lora.scale)
            pipe.unload_lora_weights()
        if extra := find_extra(self.model):
            if (extra_header(extra) or {}).get("kind") == GuidanceAdapters.kind:
                return DistilledGuidancePipeline.of(pipe).load_adapters(self.model)
            apply_extra(pipe, self.model)
        else:
            load_lora(pipe, find_lora(str(self.model)), "default_0")
        return pipe

    @staticmethod
    def open(folder: str | Path) -> Run:
        """An earlier run. Raises UserError when the folder is none."""
        folder = Path(folder)
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"'{folder}' is no run folder: it has no recipe.yaml; pass the folder that `train` printed")
        from .recipe import load_recipe

        log = read_log(folder / "log.jsonl")
        return Run(folder, load_recipe(folder / "recipe.yaml"), log[-1]["step"] if log else 0, log)


class Signals:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def watching(self) -> Iterator[Signals]:
        """Handlers in place for a while; in a notebook's other thread, nothing is changed."""
        import threading

        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Where to go on from: ``auto`` the newest in the run's folder, a PATH that one, ``never`` none.

    Raises UserError when ``never`` meets checkpoints that would be lost, or PATH is none."""
    own = checkpoint_dirs(folder / "checkpoints")
    if resume == "auto":
        return own[-1] if own else None
    if resume == "never":
        if own:
            raise UserError(f"{folder} holds a run at {own[-1].name}; set another output.dir, or use --resume auto")
        return None
    path = Path(resume)
    if not (path / "state.json").is_file():
        inner = checkpoint_dirs(path / "checkpoints") or checkpoint_dirs(path)
        if not inner:
            raise UserError(f"--resume {resume}: no checkpoint there; pass a step-... folder, or auto, or never")
        path = inner[-1]
    return path


def is_rank_zero() -> bool:
    """Whether a launcher made this process the one that speaks; True without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def check_writable(folder: Path) -> None:
    """Raises UserError when the run's folder cannot be made or written to; one process asks for all.

    Leaves nothing behind, since other input may yet be refused."""
    if not is_rank_zero():
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        for path in made:
            path.rmdir()
    except OSError as error:
        raise UserError(f"cannot write to '{folder}' ({error.strerror}); set output.dir to a folder you own") from error


class Session:
    """One process's view of a run."""

    def __init__(self, recipe: Recipe, resume: str = "auto", progress: bool = True) -> None:
        self.recipe = recipe
        self.folder = recipe.output_dir()
        check_writable(self.folder)
        check_trackers(recipe.output)
        check_optimizer(recipe.train)
        checkpoint = find_checkpoint(self.folder, resume)
        tensors, facts = load_checkpoint(checkpoint) if checkpoint else ({}, {})
        if checkpoint:
            check_same_recipe(recipe, facts["recipe"], checkpoint)
        self.console = Console(progress and is_rank_zero())
        self.parts: Parts = build(recipe, self.console.say, self.console.counting("encoding"))
        self.weights = self.parts.model.fingerprint()
        self.best = BestKeeper()
        self.saved = -1  # the step of the newest checkpoint of this process
        self.kept = checkpoint is not None  # whether there is any
        if checkpoint:
            if facts["data"] != self.parts.data_fingerprint:
                raise UserError(
                    f"checkpoint {checkpoint} was trained on other rows of data.path; put them back, or set another "
                    "output.dir"
                )
            if facts["weights"] != self.weights:
                raise UserError(
                    f"checkpoint {checkpoint} was trained on other weights than model.path holds now; put them back, "
                    "or set another output.dir"
                )
            self.trainer.load(tensors)
            self.best = BestKeeper(**facts["best"])
            self.console.say(f"going on from {checkpoint} (step {self.trainer.step} of {recipe.train.steps})")
        self.sheets = Sheets(self.parts)
        if self.main:
            self._describe()
        resumed = self.trainer.step if checkpoint else None
        self.log = RunLog(self.folder, recipe.output, recipe.name, resumed) if self.main else None
        self.guards = Guards(recipe.train.guards, self.log.rows if self.log else ())

    @property
    def trainer(self) -> Any:
        """The loop."""
        return self.parts.trainer

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return bool(self.parts.accelerator.is_main_process)

    def _describe(self) -> None:
        """recipe.yaml, with the hashes of what it uses."""
        import yaml

        used = {"data": self.parts.data_fingerprint, **self.weights}
        self.folder.mkdir(parents=True, exist_ok=True)
        header = "".join(f"# {key}: {value}\n" for key, value in used.items())
        write_atomic(self.folder / "recipe.yaml", header + yaml.safe_dump(self.recipe.dump(), sort_keys=False))

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        """Train to the recipe's last step, then export and report.

        Raises Interrupted after a checkpoint, RunError when training cannot go on."""
        trainer, steps = self.trainer, self.recipe.train.steps
        signals = Signals()
        try:
            with signals.watching(), self.console.tracking(trainer.step, steps) as advance:
                if trainer.step == 0:
                    self.look()
                started, since, waited = time.perf_counter(), trainer.step, trainer.waited
                while trainer.step < steps:
                    trainer.train_step()
                    step = trainer.step
                    if step % self.recipe.train.log_every == 0 or step == steps:
                        seconds = time.perf_counter() - started
                        row = self.log_row(step - since, seconds, trainer.waited - waited)
                        advance(step, row)
                        started, since, waited = time.perf_counter(), step, trainer.waited
                    else:
                        advance(step, None)
                    if step % self.recipe.validate_.every == 0 or step == steps:
                        self.look()
                        started, since, waited = time.perf_counter(), step, trainer.waited
                    if step % self.recipe.train.save_every == 0 or step == steps:
                        self.save()
                    if self.stop_asked(signals.asked):
                        if step < steps:
                            self.save()
                            raise Interrupted(f"interrupted after step {step}; {self.go_on()}")
                        break
            return self.finish()
        except torch.OutOfMemoryError as error:
            raise RunError(
                "the GPU is out of memory; take your card's --preset, lower train.micro_batch (the result stays), set "
                "model.gradient_checkpointing=true, or lower data.resolution, model.lora.rank or validate.images; "
                + self.go_on()
            ) from error
        except (OSError, SafetensorError) as error:  # a full disk shows anywhere: log, samples, export
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RunError(f"a file of '{self.folder}' could not be written or read: {why}; {self.go_on()}") from error
        finally:
            trainer.close()
            if self.log:
                self.log.close()

    def stop_asked(self, asked: bool) -> bool:
        """One decision of all ranks, asked for where the step waits anyway."""
        if self.trainer.world == 1:
            return asked
        if self.trainer.step % self.recipe.train.log_every:
            return False
        flag = torch.tensor(float(asked), device=self.trainer.ctx.device)
        return bool(self.trainer.reduce(flag) > 0)

    def go_on(self) -> str:
        """How to continue."""
        kept = checkpoint_dirs(self.folder / "checkpoints")
        where = f"the last checkpoint is {kept[-1]}" if kept else ""
        return f"{where}; the same command goes on from there" if kept else "no checkpoint was written yet"

    def log_row(self, steps: int, seconds: float, waited: float) -> dict[str, float]:
        """Read the meter (the one synchronisation of an interval), guard, and write a row."""
        trainer, train = self.trainer, self.recipe.train
        values = trainer.meter.read(trainer.reduce)
        values["lr"] = next(iter(trainer.optimizers.values())).param_groups[0]["lr"]
        values["rows_per_second"] = steps * trainer.fresh * train.batch / seconds
        values["data_share"] = waited / seconds
        skipped, streak = (int(n) for n in torch.stack([trainer.skipped, trainer.streak]).tolist())
        if skipped:
            values["skipped"] = skipped
        if trainer.ctx.device.type == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.log:
            self.log.write(trainer.step, values)
        if streak > train.max_nonfinite:
            raise RunError(
                f"{streak} updates in a row had non-finite gradients (train.max_nonfinite={train.max_nonfinite}); "
                f"lower train.lr or set train.precision=bf16 or fp32; {self.go_on()}"
            )
        self.act(self.guards.logged(values) if self.main else [])
        return values

    def look(self) -> None:
        """Held-out metrics, the sheet of samples, and the guards on both."""
        trainer, recipe = self.trainer, self.recipe.validate_
        values: dict[str, float] = {}
        if self.parts.heldout is not None:
            values = heldout_metrics(trainer, self.parts.heldout, recipe)
            values["held_out"] = len(self.parts.heldout) * recipe.draws
        if self.main or trainer.roles.shards is not None:
            values |= self.sheets.draw(self.folder / "samples")
        if self.main:
            assert self.log is not None
            if values:
                self.log.write(trainer.step, values, "validate")
                self.console.validated(trainer.step, values)
        self.act(self.guards.looked(values) if self.main else [])
        if "loss" in values and recipe.keep_best and trainer.step:
            self.best.offer(trainer.step, values["loss"], self.save)

    def act(self, alarms: list[Alarm]) -> None:
        """Log and say what fired; stop where the policy asks for it, all processes together.

        The checkpoints from before are kept, and none is written of what went wrong, unless there is none yet.
        Raises RunError on a stop."""
        for alarm in alarms:
            assert self.log is not None
            self.log.event(self.trainer.step, alarm.guard, alarm.text, alarm.policy)
            if alarm.policy == "warn":
                self.console.say(f"note: {alarm.text} (train.guards.{alarm.guard}=stop ends a run here)")
        fatal = [alarm for alarm in alarms if alarm.policy == "stop"]
        stop = bool(fatal)
        if self.trainer.world > 1 and self.guards.may_stop:
            stop = bool(self.trainer.reduce(torch.tensor(float(stop), device=self.trainer.ctx.device)) > 0)
        if not stop:
            return
        if not self.kept:
            self.save()
        if self.main:
            self.write_report()
        self.parts.accelerator.wait_for_everyone()  # a launcher ends all as soon as one has ended
        where = (checkpoint_dirs(self.folder / "checkpoints") or [self.folder])[-1]
        text = "; ".join(f"{alarm.text}; stopped by train.guards.{alarm.guard}=stop" for alarm in fatal)
        raise RunError(f"{text}; the last checkpoint is {where}; {advice(fatal)}")

    def save(self) -> Path:
        """A checkpoint by rank 0; the others wait for it."""
        trainer, folder = self.trainer, self.folder / "checkpoints"
        final = folder / f"step-{trainer.step:06d}"
        if self.saved == trainer.step:  # as the best one, a moment ago
            return final
        state = trainer.state()
        if self.main:
            assert self.log is not None
            self.log.sync()
            facts = {
                "step": trainer.step,
                "data": self.parts.data_fingerprint,
                "weights": self.weights,
                "best": {"step": self.best.step, "value": self.best.value},
                "recipe": self.recipe.dump(),
            }
            save_checkpoint(folder, trainer.step, state, facts)
            prune(folder, self.recipe.train.keep, [self.best.step] if self.best.step else [])
        self.parts.accelerator.wait_for_everyone()
        self.saved, self.kept = trainer.step, True
        return final

    def finish(self) -> Run:
        """Export, card and report."""
        run = Run(self.folder, self.recipe, self.trainer.step, self.log.rows if self.log else [])
        if self.recipe.output.weights == "best" and self.best.step is not None:
            self.trainer.load(load_checkpoint(self.folder / "checkpoints" / f"step-{self.best.step:06d}")[0])
        if self.main or self.trainer.roles.shards is not None:
            export_run(self.parts, self.trainer, run)
        if self.main:
            self.write_report()
        self.parts.accelerator.wait_for_everyone()
        return run

    def write_report(self) -> None:
        """The page of this run."""
        from .eval.report import write_run_report

        write_run_report(self.folder)


def train(
    recipe: Recipe, resume: str = "auto", progress: bool = True, watch: Callable[[Session], None] | None = None
) -> Run:
    """Train a recipe; ``watch`` sees the session before its first step (benchmarks use it)."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    flushing = flushes_denormals()
    try:
        # saturated losses make gradients below 1e-38, at which a CPU is slow; set first, since new threads inherit it
        torch.set_flush_denormal(True)
        session = Session(recipe, resume, progress)
        if watch is not None:
            watch(session)
        return session.run()
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the GPU is out of memory before training; take your card's --preset, set "
            "model.offload=true, or lower data.encode_batch or data.resolution"
        ) from error
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_flush_denormal(flushing)


def flushes_denormals() -> bool:
    """Whether this thread takes fp32 numbers below 1e-38 for 0; torch can set it and not tell it."""
    return not bool((torch.full((1,), 1e-40, device="cpu") * 1.0).any())


def describe(run: Run) -> str:
    """The last numbers of a run in a line."""
    last: dict[str, float] = next((row for row in reversed(run.log) if row["kind"] == "validate"), {})
    shown = {k: round(v, 4) for k, v in last.items() if k in ("loss", "accuracy", "margin", "chosen_gain")}
    return json.dumps(shown)
