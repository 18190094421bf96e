"""`pairs caption`: real image-to-text and text models of tiny random weights, kills, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import picture, write_pairs
from test_data_readers import recipe
from tiny import END, START, write_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign.cli import main
from diffalign.data import caption
from diffalign.data.caption import CaptionOptions, caption_pairs
from diffalign.data.captioner import Captioner, ModelPerturber, _asking, load_captioner, load_perturber
from diffalign.data.convert import Converted, ConvertOptions, convert_pairs
from diffalign.data.perturb import perturb
from diffalign.data.readers import read_pairs
from diffalign.errors import RunError, UserError
from diffalign.eval.ranks import Ranks

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} answer:{% endif %}"
)


def tokenizer(special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocab = {START: 0, END: 1, **{name: 2 + i for i, name in enumerate(special)}}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=START, eos_token=END, pad_token=END, additional_special_tokens=list(special)
    )


def awake(kind: Any, config: Any, seed: int = 0) -> Any:
    """A model with weights large enough that different inputs are answered differently; a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, words = tmp_path_factory.mktemp("blip"), tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "encoder_hidden_size": 16, "bos_token_id": 0, "sep_token_id": 1}
    config = BlipConfig(
        text_config={**text, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 64},
        vision_config={**small, "image_size": 32, "patch_size": 8},
    )
    awake(BlipForConditionalGeneration, config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessorPil(size=size), words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, words = tmp_path_factory.mktemp("llava"), tokenizer(("<image>",))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=32, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=1),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    awake(LlavaForConditionalGeneration, config, 3).save_pretrained(folder)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pixels, words, 8, "default", TEMPLATE, num_additional_image_tokens=1
    ).save_pretrained(folder)  # fmt: skip
    return folder


def run(source: Path, target: Path, form: str = "folder", link: bool = False, **options: Any) -> Converted:
    data = recipe(source, ties="keep", duplicates="keep")
    given = CaptionOptions(**{"device": "cpu", "max_tokens": 6, "batch": 2, **options})
    return caption_pairs(data, target, ConvertOptions(form, link=link), given)


def texts(folder: Path) -> list[tuple[str, str | None]]:
    return [(row.prompt, row.rejected_prompt) for row in read_pairs(recipe(folder)).rows]


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


# ---- the models -----------------------------------------------------------------------------------------------------


def test_a_picture_model_says_what_each_picture_shows(blip: Path, tmp_path: Path) -> None:
    """DCPO-c by a real BLIP class: winner's and loser's own captions, the prompt kept, pictures' bytes as they were."""
    data = write_pairs(tmp_path / "pairs", 5)
    found = run(data, tmp_path / "out", strategy="caption", captioner=str(blip))
    assert found.made["pairs captioned"] == 5 and not list(tmp_path.glob(".out*"))
    captioner = load_captioner(str(blip), CPU, torch.float32, max_tokens=6)
    rows, made = read_pairs(recipe(data)).rows, listed(tmp_path / "out")
    for row, line in zip(rows, made, strict=True):
        alone = [captioner([ref.load()], [row.prompt])[0] for ref in (row.chosen, row.rejected)]
        assert [line["prompt"], line["rejected_prompt"]] == alone and alone[0] != alone[1]
        assert line["original_prompt"] == row.prompt
        assert (tmp_path / "out" / line["chosen_file_name"]).read_bytes() == row.chosen.read()


def test_a_chat_model_is_told_the_prompt(llava: Path) -> None:
    captioner = load_captioner(str(llava), CPU, torch.float32, max_tokens=6)
    assert captioner._question("a {red} cat").count("a {red} cat") == 1
    pictures = [picture(1), picture(2), picture(1)]
    said = captioner(pictures, ["a cat", "a cat", "a much longer prompt about a dog"])
    assert len(set(said)) == 3, "pictures and prompts are both seen"
    for i, one in enumerate(said):
        assert captioner([pictures[i]], [["a cat", "a cat", "a much longer prompt about a dog"][i]]) == [one]
    captioner.processor.chat_template = None
    with pytest.raises(UserError, match="needs its processor's chat template"):
        captioner(pictures, [""] * 3)
    assert all("answer:" not in text and "Describe" not in text for text in said), "the question is no caption"


def test_what_a_chat_model_raises_is_one_line(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template that knows no pictures, one that refuses, a processor that cuts the pictures otherwise than the model
    takes them: exit 2, no traceback. Computing that fails is exit 1."""
    captioner = load_captioner(str(llava), CPU, torch.float32, max_tokens=6)
    templates = {
        "{{ messages[0]['content'] | no_such_filter }}": "no_such_filter",
        "{{ raise_exception('only text is spoken here') }}": "only text is spoken here",
        "question: {{ messages[0]['content'][1]['text'] }}": "ValueError",
    }
    for template, said in templates.items():
        captioner.processor.chat_template = template
        with pytest.raises(UserError, match=rf"\(LlavaForCond\w+\) does not answer .*{said}.*; take a model whose"):
            captioner([picture(1)], ["a cat"])
    shutil.copytree(llava, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(next(iter(templates)))
    told = ["--strategy", "caption", "--captioner", tmp_path / "chat", "--device", "cpu", "--quiet"]
    _, err = command(monkeypatch, capsys, 2, write_pairs(tmp_path / "pairs", 1), tmp_path / "out", *told)
    assert "no_such_filter" in err.splitlines()[-1] and "Traceback" not in err
    kept = r"says no \(RuntimeError: shapes\); captions made so far are kept; mend"
    with pytest.raises(RunError, match=kept), _asking("says no", "mend"):
        raise RuntimeError("shapes")
    with pytest.raises(torch.OutOfMemoryError), _asking("says no", "mend"):
        raise torch.OutOfMemoryError
    assert not (tmp_path / "out").exists()


def t5(folder: Path, name: str) -> Path:
    words = tokenizer()
    config = T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    awake(T5ForConditionalGeneration, config).save_pretrained(folder / name)
    words.save_pretrained(folder / name)
    return folder / name


def test_control_codes_and_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8.2: lexical 40/60/80 and order 0 as codes of 100 minus these, three sentences at a time."""
    found = load_perturber(str(t5(tmp_path, "dipper-tiny")), "weak", CPU, torch.float32)
    assert isinstance(found, ModelPerturber) and found.dipper
    asked: list[str] = []
    monkeypatch.setattr(
        ModelPerturber, "_generate", lambda self, texts: [asked.extend(texts), [f"said {len(t)}." for t in texts]][1]
    )
    made = found(["One. Two! Three? Four.", "Alone"], 0)
    head = "lexical = 60, order = 100 Paraphrase and perturb the following image caption."
    assert asked[0] == f"{head} <sent> One. Two! Three? </sent>" and asked[1] == f"{head} <sent> Alone </sent>"
    assert asked[2] == f"{head} said {len(asked[0])}. <sent> Four. </sent>" and len(asked) == 3
    assert made == [f"said {len(asked[0])}. said {len(asked[2])}.", f"said {len(asked[1])}."]
    for level, code in (("medium", 40), ("strong", 20)):
        found.level = level
        assert found._asked("x", "").startswith(f"lexical = {code}, order = 100")


def test_text_models_sample_by_the_seed(tmp_path: Path) -> None:
    causal = tmp_path / "causal"
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    awake(LlamaForCausalLM, config).save_pretrained(causal)
    words.save_pretrained(causal)
    for place in (causal, t5(tmp_path, "plain")):
        found = load_perturber(str(place), "medium", CPU, torch.float32)
        assert isinstance(found, ModelPerturber) and not found.dipper
        found.max_tokens = 8
        assert "60 percent" in found._asked("a cat", "") and "a cat" in found._asked("a cat", "")
        state = torch.get_rng_state()
        first = found(["a cat", "two dogs on a hill"], 3)
        assert first == found(["a cat", "two dogs on a hill"], 3) != found(["a cat", "two dogs on a hill"], 4)
        assert torch.equal(state, torch.get_rng_state()) and "percent" not in "".join(first)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_rules_as_a_command_and_as_a_data_option_agree(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs", 6)
    expected = [(r.prompt, r.rejected_prompt) for r in read_pairs(recipe(data, perturb="strong")).rows]
    for form in ("folder", "parquet", "webdataset", "csv", "datasets"):
        run(data, tmp_path / form, form, level="strong")
        assert texts(tmp_path / form) == expected
    convert_pairs(recipe(data, perturb="strong"), tmp_path / "plain", ConvertOptions("folder"))
    assert texts(tmp_path / "plain") == expected
    linked = run(data, tmp_path / "linked", link=True)
    assert (linked.target / listed(linked.target)[0]["chosen_file_name"]).is_symlink()
    # perturbing what was captioned is the hybrid, and the first prompt stays the original one
    run(tmp_path / "folder", tmp_path / "twice", level="weak")
    for line, (prompt, loser) in zip(listed(tmp_path / "twice"), expected, strict=True):
        assert line["prompt"] == line["original_prompt"] == prompt
        assert line["rejected_prompt"] == perturb(str(loser), 0.4)


def test_hybrid_perturbs_the_losers_own_caption(blip: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs", 3)
    run(data, tmp_path / "c", strategy="caption", captioner=str(blip))
    run(data, tmp_path / "h", strategy="hybrid", captioner=str(blip), level="weak")
    assert texts(tmp_path / "h") == [(w, perturb(str(loser), 0.4)) for w, loser in texts(tmp_path / "c")]


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its third batch, with a torn line: the first two are not made again, and the files are the same."""
    data = write_pairs(tmp_path / "pairs", 9)
    run(data, tmp_path / "whole")
    made: list[int] = []
    inner = caption._captioned

    def counted(rows: Any, *rest: Any) -> Any:
        made.append(len(rows))
        if len(made) == 3:
            raise OSError("killed")
        return inner(rows, *rest)

    monkeypatch.setattr(caption, "_captioned", counted)
    with pytest.raises(OSError, match="killed"):
        run(data, tmp_path / "out")
    (log,) = (tmp_path / ".out.captions").glob("*.jsonl")
    with open(log, "ab") as file:
        file.write(b'{"id": "torn')
    run(data, tmp_path / "out")
    assert made == [2, 2, 2, 2, 2, 1]
    assert listed(tmp_path / "out") == listed(tmp_path / "whole")
    again = run(data, tmp_path / "out")
    assert len(made) == 6 and again.made == {"pairs captioned": 9}, "done already: reported again"
    with pytest.raises(UserError, match="exists already"):
        run(data, tmp_path / "out", level="weak")


def test_processes_share_the_batches(tmp_path: Path) -> None:
    """Two processes' parts, made one after the other: together what one makes alone, and nothing twice."""
    data = recipe(write_pairs(tmp_path / "pairs", 9))
    rows, options = read_pairs(data).rows, CaptionOptions(batch=2)
    alone = caption.Log(tmp_path / "alone", {}, Ranks())
    caption._make(rows, options, data, alone, Ranks(), None)
    for rank in (0, 1):
        log = caption.Log(tmp_path / "both", {}, Ranks(rank, 2))
        caption._make(rows, options, data, log, Ranks(rank, 2), None)
        log.close()
    alone.close()
    counts = [len((tmp_path / "both" / f"{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert counts == [5, 4] and log.read() == alone.read() and len(log.read()) == 9


def test_a_model_that_says_nothing(blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some empty captions: the prompt stays and they are counted. None but empty ones: one line."""
    data = write_pairs(tmp_path / "pairs", 3)
    rows = read_pairs(recipe(data)).rows
    options = {"strategy": "caption", "captioner": str(blip)}
    monkeypatch.setattr(
        Captioner, "__call__", lambda self, p, t: [" " if text == rows[1].prompt else "x" for text in t]
    )
    found = run(data, tmp_path / "some", **options)
    assert found.made["empty captions replaced by the text before"] == 2
    assert texts(tmp_path / "some") == [("x", "x"), (rows[1].prompt, rows[1].prompt), ("x", "x")]
    assert found.made["pairs with two equal captions"] == 3
    monkeypatch.setattr(Captioner, "__call__", lambda self, p, t: [""] * len(t))
    with pytest.raises(UserError, match="gave no text for any pair"):
        run(data, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".none*"))


def command(monkeypatch: Any, capsys: Any, status: int, *args: object) -> tuple[str, str]:
    """The command's own entry point, in this process."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["diffalign", "pairs", "caption", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0) == status
    return tuple(capsys.readouterr())  # type: ignore[return-value]


def test_bad_input_is_one_line(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "pairs", 3)
    model = write_tiny_model(tmp_path / "sd")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a cat"}\n')
    torn = Path(shutil.copytree(blip, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes((blip / "model.safetensors").read_bytes()[:99])
    for options, said in (
        ({"strategy": "caption"}, "needs an image-to-text model: --captioner"),
        ({"strategy": "perturb", "captioner": str(blip)}, "looks at no picture"),
        ({"strategy": "caption", "captioner": "nobody/such-model"}, "captioner 'nobody/such-model' cannot be loaded"),
        ({"strategy": "caption", "captioner": str(model / "text_encoder")}, "give the folder or hub id of an image-to"),
        ({"strategy": "caption", "captioner": str(torn)}, "give the folder or hub id of an image-to"),
        ({"perturber": str(model / "unet")}, "'rules'"),
        ({"level": "stronk"}, "unknown level 'stronk'; did you mean 'strong'?"),
    ):
        with pytest.raises(UserError) as caught:
            run(data, tmp_path / "out", **options)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    out, err = command(monkeypatch, capsys, 2, prompts, tmp_path / "out")
    assert "has no column 'chosen'" in err and len(err.splitlines()) == 1
    out, err = command(monkeypatch, capsys, 0, data, tmp_path / "told", "--level", "strong", "--json", "--quiet")
    assert json.loads(out)["made"] == {"pairs captioned": 3}
