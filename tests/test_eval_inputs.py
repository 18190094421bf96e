"""Prompt sets, items, and the pixel pipeline against its golden values and against Hugging Face's own processor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_tiny import golden, write_samples
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign.errors import UserError
from diffalign.eval.items import read_items
from diffalign.eval.preprocess import CLIP_MEAN, CLIP_STD, P1, decode
from diffalign.eval.prompts import builtin_sets, prompts_sha256, read_prompts, text_id

GOLDEN = [
    ((512, 512), "torchvision", 19108009, "f5c00bf1c11a"),
    ((512, 512), "hf", 19108009, "f5c00bf1c11a"),
    ((768, 512), "torchvision", 19150720, "722aa1ff0233"),
    ((768, 512), "hf", 19150720, "722aa1ff0233"),
    ((227, 224), "torchvision", 19002904, "1e9669109959"),
    ((227, 224), "hf", 18974194, "7ef104ed6286"),
    ((300, 451), "torchvision", 19128868, "2c091f1b3e3b"),
    ((300, 451), "hf", 19128868, "2c091f1b3e3b"),
]
MEANS = {(512, 512): 0.179364, (768, 512): 0.183623, (227, 224): 0.168939, (300, 451): 0.181437}


@pytest.mark.parametrize(("size", "rounding", "total", "sha"), GOLDEN)
def test_p1_golden_values(size: tuple[int, int], rounding: str, total: int, sha: str) -> None:
    pixels = P1(rounding=rounding).crop(golden(*size))  # type: ignore[arg-type]
    assert int(pixels.astype(np.int64).sum()) == total
    assert hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:12] == sha
    if rounding == "torchvision":
        assert float(P1(rounding="torchvision")([golden(*size)]).mean()) == pytest.approx(MEANS[size], abs=1e-6)


@pytest.mark.parametrize(
    "size", [(512, 512), (768, 512), (227, 224), (300, 451), (1000, 667), (224, 224), (100, 64), (33, 700)]
)
def test_p1_is_the_hugging_face_processor_bit_for_bit(size: tuple[int, int]) -> None:
    theirs = CLIPImageProcessorPil()(golden(*size), return_tensors="pt").pixel_values
    assert torch.equal(theirs, P1()([golden(*size)]))


def test_p1_of_one_colour_is_that_colour() -> None:
    for size in [(31, 77), (224, 224), (400, 300)]:
        pixels = P1()([Image.new("RGB", (size[1], size[0]), (10, 100, 200))])
        want = (torch.tensor([10.0, 100, 200]) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        assert torch.allclose(pixels, want.view(1, 3, 1, 1).expand_as(pixels), atol=1e-6)


def test_p1_commutes_with_a_flip_on_even_margins() -> None:
    picture = golden(224, 300)
    flipped = P1().crop(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert np.array_equal(flipped, P1().crop(picture)[:, ::-1])


def test_p1_in_torch_is_close_and_has_gradients() -> None:
    smooth = golden(300, 451).resize((90, 60), Image.Resampling.BILINEAR).resize((451, 300), Image.Resampling.BICUBIC)
    floats = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None].float() / 255
    floats.requires_grad_()
    pixels = P1().tensor(floats)
    assert pixels.shape == (1, 3, 224, 224)
    assert (
        float((pixels.detach() - P1()([smooth])).abs().mean()) < 0.01
    )  # rounding to 256 levels is 0.0075 a step and a channel
    pixels.sum().backward()
    assert floats.grad is not None and float(floats.grad.abs().sum()) > 0
    small = torch.rand(2, 3, 32, 32)  # no resize, no crop: exact
    assert torch.allclose(P1(32).tensor(small)[:, 0], (small[:, 0] - CLIP_MEAN[0]) / CLIP_STD[0], atol=1e-6)


def test_decoding_turns_and_flattens(tmp_path: Path) -> None:
    wide = Image.new("RGB", (20, 10), (200, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "turned.jpg", exif=exif)
    turned = decode(tmp_path / "turned.jpg")
    assert turned.image.size == (10, 20) and turned.flags == ("rotated",)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(clear).image.getpixel((0, 0)) == (255, 255, 255) and decode(clear).flags == ("alpha",)
    assert decode(Image.new("RGBA", (4, 4), (9, 8, 7, 255))).flags == ()
    assert decode(Image.new("L", (4, 4), 7)).image.getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(OSError):
        decode(b"not an image")


def test_prompts_from_every_form(tmp_path: Path) -> None:
    assert [p.prompt for p in read_prompts("a corgi's head")] == ["a corgi's head"]
    (tmp_path / "a.txt").write_text("a cat\n\na dog\na cat\n", encoding="utf-8-sig")
    cats = read_prompts(str(tmp_path / "a.txt"))
    assert [p.prompt for p in cats] == ["a cat", "a dog", "a cat"]
    assert cats[0].id == text_id("a cat") == read_prompts("a cat")[0].id and cats[2].id == cats[0].id + "-2"
    rows = [{"id": 7, "prompt": "x", "category": "c"}, {"id": "b", "caption": "y"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mixed = read_prompts(tmp_path / "a.jsonl")
    assert [(p.id, p.prompt, p.category) for p in mixed] == [("7", "x", "c"), ("b", "y", None)]
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\nthe word "START"\tText\n"quoted\tText\n')
    assert [p.prompt for p in read_prompts(tmp_path / "p.tsv")] == ['the word "START"', '"quoted']
    (tmp_path / "c.csv").write_text('prompt,id\n"a, b",1\n')
    assert read_prompts(tmp_path / "c.csv")[0].prompt == "a, b"
    assert prompts_sha256(cats) != prompts_sha256(cats[::-1]) and prompts_sha256(cats) == prompts_sha256(list(cats))


def test_sets_that_ship() -> None:
    for name in builtin_sets():
        prompts = read_prompts(name)
        assert len({p.id for p in prompts}) == len(prompts) > 0
    assert len(read_prompts("tiny-heldout")) >= 200


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("twice.jsonl", '{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "lines 1 and 2"),
        ("empty.txt", "\n\n", "no prompt"),
        ("column.csv", "foo\nbar\n", "no column 'prompt'"),
        ("blank.jsonl", '{"prompt": " "}', "empty prompt"),
        ("broken.jsonl", '{"prompt": ', "line 1 of"),
        ("list.jsonl", "[1]", "not a JSON object"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts(tmp_path / name)


def test_bad_prompt_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_prompts("nowhere/prompts.txt")
    with pytest.raises(UserError, match="did you mean 'tiny-heldout'"):
        read_prompts("tiny-heldut")
    with pytest.raises(UserError, match="empty"):
        read_prompts(" ")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def plain(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def test_items_of_plain_folders(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "a", "prompt": "A"}\n{"id": "b", "prompt": "B"}\n')
    by_name = read_items(plain(tmp_path / "names", ["b-1.png", "a.png", "b_0.png"]), prompts)
    assert [(i.id, i.k, i.image) for i in by_name.items] == [
        ("a", 0, "a.png"),
        ("b", 0, "b_0.png"),
        ("b", 1, "b-1.png"),
    ]
    by_order = read_items(plain(tmp_path / "order", ["10.png", "9.png"]), prompts)
    assert [(i.id, i.image) for i in by_order.items] == [
        ("a", "9.png"),
        ("b", "10.png"),
    ] and "sorted" in by_order.notes[0]
    one = read_items(tmp_path / "names", "a single text")
    assert [i.k for i in one.items] == [0, 1, 2] and len(one.prompts) == 1
    column = tmp_path / "c.csv"
    column.write_text("image,prompt\n9.png,nine\n10.png,ten\n")
    assert [(i.prompt, i.image) for i in read_items(tmp_path / "order", column).items] == [
        ("nine", "9.png"),
        ("ten", "10.png"),
    ]


def test_items_that_do_not_fit(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "a", "prompt": "A"}\n{"id": "b", "prompt": "B"}\n')
    cases = {
        "3 images .* but 2 prompts": plain(tmp_path / "three", ["x.png", "y.png", "z.png"]),
        "belongs to no prompt id": plain(tmp_path / "strange", ["a.png", "x.png"]),
        r"1 prompts .* have no image .*\(b\)": plain(tmp_path / "lack", ["a.png"]),
        "both stand for id 'a', k 0": plain(tmp_path / "double", ["a.png", "a-0.png", "b.png"]),
        "holds no images": plain(tmp_path / "none", []),
    }
    for says, folder in cases.items():
        with pytest.raises(UserError, match=says):
            read_items(folder, prompts)
    with pytest.raises(UserError, match="--prompts"):
        read_items(tmp_path / "three")
    with pytest.raises(UserError, match="no folder"):
        read_items(tmp_path / "nowhere")


def test_items_of_a_manifest(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "s", ["one", "two"], per_prompt=2)
    whole = read_items(folder)
    assert len(whole.items) == 4 and [p.prompt for p in whole.prompts] == ["one", "two"]
    assert read_items(folder / "manifest.jsonl").items == whole.items
    subset = tmp_path / "subset.jsonl"
    subset.write_text('{"id": "p001", "prompt": "two"}\n{"id": "zz", "prompt": "three"}\n')
    some = read_items(folder, subset)
    assert len(some.items) == 2 and "1 prompts" in some.notes[0]
    subset.write_text('{"id": "p001", "prompt": "another"}\n')
    with pytest.raises(UserError, match="differs between"):
        read_items(folder, subset)
    manifest = folder / "manifest.jsonl"
    rows = manifest.read_text()
    manifest.write_text(rows + rows.splitlines()[0] + "\n")
    with pytest.raises(UserError, match="twice"):
        read_items(folder)
    manifest.write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="line 1"):
        read_items(folder)
