"""Multi-student distillation: a partition parts every prompt, and each is drawn by its part's student (sheet 15)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import diffalign
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_few_step import student
from tiny import SD_SCHEDULE
from typer.testing import CliRunner

import diffalign as library
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.eval.prompts import read_prompts
from diffalign.facts import student_record
from diffalign.partition import Partition, by_clusters, by_words, features_of, read_partition, split_prompts
from diffalign.pipelines.few_step import FewStepPipeline
from diffalign.pipelines.multi_student import MultiStudentPipeline
from diffalign.pipelines.parts import sample_parts
from diffalign.pipelines.sample import sample
from diffalign.pipelines.spec import SampleSpec

FILE = Path(__file__).parents[1] / "pipelines" / "multi_student.py"
WORDS: dict[str, Any] = {"red": ["red", "dark red"], "round": ["circle"], "rest": []}
PROMPTS = ["a red circle", "a blue circle", "a blue square", "A RED square", "a redder circle, credited"]
PARTS = ["red", "round", "rest", "red", "round"]
TIMES = {"red": (999, 749, 499, 249), "round": (999, 499), "rest": (899, 449)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Three students of different times and kinds of step, of which one lies elsewhere."""
    folder = tmp_path_factory.mktemp("msd")
    partition = by_words(WORDS).model_copy(update={"students": {"rest": "elsewhere/other"}})
    partition.save(folder)
    for number, (name, times) in enumerate(TIMES.items()):
        place = folder / ("elsewhere/other" if name == "rest" else name)
        file = student(tiny_model_folder, place / "model", student_record(SD_SCHEDULE, times, renoise=name != "rest"))
        scaled(file, 1 + number / 2)
    return folder


def scaled(folder: Path, factor: float) -> None:
    """The same LoRA at another strength: a student of its own."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = {k: v * factor if "lora_B" in k else v for k, v in load_file(file).items()}
    save_file(tensors, file, header)


def noises(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7 + k) for k in range(count)]


# ---- partitions ------------------------------------------------------------------------------------------------------


def test_words_part_every_prompt_by_the_first_part_that_has_one() -> None:
    assert by_words(WORDS).part_of(PROMPTS) == PARTS
    assert by_words(WORDS).part_of(["a coloured square", "reddish", "dark-red"]) == ["rest", "rest", "red"]
    assert by_words({"all": None}).part_of(PROMPTS) == ["all"] * 5
    assert by_words({"rest": [], "red": ["red"]}).part_of(["red", "blue"]) == ["red", "rest"]


def test_clusters_are_the_nearest_means() -> None:
    torch.manual_seed(0)
    middles = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    of = torch.arange(60) % 3
    x = middles[of] + 0.02 * torch.randn(60, 8)
    partition = by_clusters(x, 3)
    found = partition.part_of([str(k) for k in range(60)], lambda texts: x[[int(t) for t in texts]])
    assert len({(a, b) for a, b in zip(found, of.tolist(), strict=True)}) == 3 and len(set(found)) == 3
    for name, centre in partition.centres.items():
        mine = x[[k for k, part in enumerate(found) if part == name]]
        torch.testing.assert_close(torch.tensor(centre), mine.mean(0))
    assert by_clusters(x, 3) == partition and by_clusters(x, 1).part_of(["0"], lambda t: x[:1]) == ["0"]
    with pytest.raises(UserError, match="3 parts cannot be made of 2 different prompts"):
        by_clusters(x[[0, 1, 0, 1]], 3)
    with pytest.raises(UserError, match="centres have 8 numbers and the model's text features 5"):
        partition.part_of(["0"], lambda texts: torch.zeros(1, 5))


def test_prompts_are_split_into_files_that_training_reads(tmp_path: Path, tiny_model_folder: Path) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text("\n".join(PROMPTS) + "\n")
    features = features_of(str(tiny_model_folder))
    texts = features(PROMPTS)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(5))
    for partition, said in ((by_words(WORDS), None), (by_clusters(texts, 2), features)):
        folder = tmp_path / str(len(partition.names))
        counts = split_prompts(str(source), folder, partition, said)
        kept, _ = read_partition(folder)
        assert kept == partition and sum(counts.values()) == 5
        found = [p for name in partition.names for p in read_prompts(folder / f"{name}.tsv")]
        assert sorted(found, key=lambda p: p.id) == sorted(read_prompts(source), key=lambda p: p.id)
        for name in partition.names:
            mine = [p.prompt for p in read_prompts(folder / f"{name}.tsv")]
            assert len(mine) == counts[name] and set(kept.part_of(mine, features)) == {name}
    with pytest.raises(UserError, match=r"no prompt of .* is in part 'red'"):
        (tmp_path / "blue.txt").write_text("a blue square\n")
        split_prompts(str(tmp_path / "blue.txt"), tmp_path / "none", by_words(WORDS))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"words": {"a": ["x"], "b": ["y"]}}, "exactly one part must have no words.* here 0"),
        ({"words": {"a": [], "b": []}}, "here 2"),
        ({"words": {"a": [" "], "b": []}}, "a word is empty"),
        ({"words": {"a/b": []}}, "pattern"),
        ({}, "by words or by centres"),
        ({"words": {"a": []}, "centres": {"a": [1.0]}}, "by words or by centres"),
        ({"centres": {"a": [1.0], "b": [1.0, 2.0]}}, "as many numbers"),
        ({"words": {"red": []}, "students": {"rde": "x"}}, "no part 'rde'; did you mean 'red'"),
    ],
)
def test_damaged_partitions_are_refused(given: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "partition.json").write_text(json.dumps(given))
    with pytest.raises(UserError, match=f"is no partition: .*{reason}"):
        read_partition(tmp_path)


def test_what_is_no_partition_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pairs split"):
        read_partition(tmp_path)
    (tmp_path / "partition.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_partition(tmp_path)
    with pytest.raises(UserError, match="are no partition"):
        by_words({"a": ["x"]})
    for wrong in (3, "red", {"red": 1}):
        with pytest.raises(UserError, match="each part needs a list"):
            by_words({"a": wrong, "b": []})


def test_the_command_parts_prompts(tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "parts.yaml").write_text("red: [red, dark red]\nround: [circle]\nrest:\n")
    base = ["pairs", "split", str(tmp_path / "prompts.txt"), str(tmp_path / "parts"), "--json"]
    found = CliRunner().invoke(app, [*base, "--words", str(tmp_path / "parts.yaml")])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert {row["part"]: row["prompts"] for row in rows} == {name: PARTS.count(name) for name in TIMES}
    assert read_partition(tmp_path / "parts")[0] == by_words(WORDS) and Path(rows[0]["file"]).is_file()
    found = CliRunner().invoke(app, [*base, "--clusters", "2", "--model", str(tiny_model_folder)])
    assert found.exit_code == 0 and sum(row["prompts"] for row in json.loads(found.stdout)) == 5
    for options, reason in (
        ([], "say how to part"),
        (["--clusters", "2", "--words", "x.yaml"], "say how to part"),
        (["--clusters", "2"], "needs --model"),
        (["--words", str(tmp_path / "prompts.txt")], "is no YAML file"),
        (["--words", str(tmp_path / "absent.yaml")], "is no YAML file"),
    ):
        with pytest.raises(UserError, match=reason):
            CliRunner().invoke(app, [*base, *options], catch_exceptions=False)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def opened(folder: Path) -> MultiStudentPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_each_prompt_is_drawn_by_its_own_student_as_that_records(parts: Path, tiny_model_folder: Path) -> None:
    pipe = opened(tiny_model_folder).load_students(parts)
    found = pipe(PROMPTS, generator=noises(5), output_type="np")
    assert found.parts == PARTS and found.images.shape[0] == 5
    different = []
    alone = {}
    for name in TIMES:
        base = DiffusionPipeline.from_pretrained(tiny_model_folder)
        alone[name] = FewStepPipeline.of(base, student_record(SD_SCHEDULE, (999,)))
        alone[name].set_progress_bar_config(disable=True)
        alone[name].load_student(str(parts / ("elsewhere/other" if name == "rest" else name)))
    for row, (prompt, part) in enumerate(zip(PROMPTS, PARTS, strict=True)):
        for name in TIMES:
            image = alone[name](prompt, generator=noises(5)[row], output_type="np").images[0]
            if name == part:
                np.testing.assert_allclose(found.images[row], image, atol=2e-3)
            else:
                different.append(float(np.abs(found.images[row] - image).max()))
    assert min(different) > 0.02, "the students are not alike"


def test_pictures_do_not_depend_on_the_others_of_a_call(parts: Path, tiny_model_folder: Path) -> None:
    pipe = opened(tiny_model_folder).load_students(parts)
    noise = torch.randn(5, 4, 8, 8, generator=noises(1)[0])
    together = pipe(PROMPTS, latents=noise, generator=noises(5), output_type="pt", height=64, width=64).images
    turned = pipe(
        PROMPTS[::-1], latents=noise.flip(0), generator=noises(5)[::-1], output_type="pt", height=64, width=64
    )
    torch.testing.assert_close(together, turned.images.flip(0), rtol=0, atol=2e-3)
    assert turned.parts == PARTS[::-1]
    one = pipe(PROMPTS[0], generator=noises(1)[0])
    assert len(one.images) == 1 and one.parts == ["red"] and one.images[0].size[0] > 0


def test_what_does_not_fit_is_refused(parts: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    pipe = opened(tiny_model_folder)
    with pytest.raises(UserError, match="no students yet"):
        pipe(PROMPTS)
    by_words({"red": ["red"], "none": []}).save(tmp_path)
    with pytest.raises(UserError, match=r"part 'red': .* records no few-step sampler"):
        pipe.load_students(tmp_path)
    pipe.load_students(parts)
    with pytest.raises(UserError, match="generator has 2 entries for 5 prompts"):
        pipe(PROMPTS, generator=noises(2))
    with pytest.raises(UserError, match="one picture a prompt"):
        pipe(PROMPTS, num_images_per_prompt=2)
    with pytest.raises(UserError, match="--lora does not go with --students"):
        sample_parts(SampleSpec(model="tiny-sd", lora="x"), parts, read_prompts("a cat"), tmp_path)


def test_sampling_a_list_is_that_of_each_student_alone(parts: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[1:4]) + "\n")  # not in the order of the parts
    common = [str(tiny_model_folder), "--prompts", str(prompts), "--height", "64", "--width", "64", "--device", "cpu"]
    done = diffalign("sample", *common, "--students", parts, "--out", tmp_path / "all", "--quiet")
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "all" / "manifest.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["part"]) for row in rows] == list(zip(PROMPTS[1:4], PARTS[1:4], strict=True))
    spec = SampleSpec(model=str(tiny_model_folder), lora=str(parts / "red"), height=64, width=64, device="cpu")
    sample(spec, read_prompts(prompts)[2:], tmp_path / "alone", progress=False)
    alone = json.loads((tmp_path / "alone" / "manifest.jsonl").read_text().splitlines()[0])
    mine, theirs = (place / row["image"] for place, row in ((tmp_path / "all", rows[2]), (tmp_path / "alone", alone)))
    assert mine.read_bytes() == theirs.read_bytes()


# ---- training --------------------------------------------------------------------------------------------------------


def test_equal_parts_give_equal_students(tmp_path: Path) -> None:
    """K = 1: the part of all prompts is the list itself, and its student the one that DMD2 makes."""
    source = tmp_path / "prompts.txt"
    source.write_text("\n".join(PROMPTS) + "\n")
    split_prompts(str(source), tmp_path / "parts", by_words({"all": []}))
    values = {"model.lora.rank": 2, "data.resolution": 32, "train.steps": 1, "train.batch": 2, "validate.pairs": 0}
    values |= {
        "validate.images": 1,
        "validate.steps": 1,
        "output.trackers": "[]",
        "data.cache_dir": tmp_path / "cache",
        "train.warmup": 0,
    }
    files = []
    for number, path in enumerate((source, tmp_path / "parts" / "all.tsv")):
        own = {"data.path": path, "output.dir": tmp_path / f"run-{number}"}
        run = library.train(
            library.load_recipe("tiny/dmd2", [f"{k}={v}" for k, v in (values | own).items()]), progress=False
        )
        files.append(next(run.model.glob("*.safetensors")))
    first, second = map(load_file, files)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert Partition.model_validate_json((tmp_path / "parts" / "partition.json").read_text()).names == ("all",)
