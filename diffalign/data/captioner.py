"""Language models by name: what says what a picture shows, and what says a caption otherwise.

Any image-to-text class of transformers captions (BLIP: from the picture alone; LLaVA and other chat models: with an
instruction that holds the prompt), any text-to-text or causal one perturbs. Pictures are prepared by the model's own
processor; without torchvision that is the one on PIL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError

from ..errors import RunError, UserError, one_line
from ..sentences import sentences
from .perturb import LEVELS, perturb

# Ours: DCPO's own words to its captioner are not public.
DESCRIBE = (
    "Describe this picture in one or two sentences. It was drawn for the prompt: {prompt}. Say what the picture "
    "really shows, as a prompt for it would. Answer with the description alone."
)
REWRITE = (
    "Paraphrase and perturb the following image caption: change about {share} percent of its words, keep their order. "
    "Answer with the caption alone. Caption: {text}"
)
PREFIX = "Paraphrase and perturb the following image caption."  # what DCPO tells DIPPER before the caption
WINDOW = 3  # sentences that DIPPER is given at once
TOP_P, MAX_LENGTH = 0.75, 256
RULES = "rules"


@contextmanager
def _asking(what: str, mend: str) -> Iterator[None]:
    """One line for what a model, its processor or its chat template raises, whatever kind that is.

    Raises UserError where they do not fit one another, RunError where computing fails; OutOfMemoryError passes."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ImportError, TemplateError) as error:
        raise UserError(f"{what} ({_reason(error)}); {mend}") from error
    except RuntimeError as error:
        raise RunError(f"{what} ({_reason(error)}); captions made so far are kept; {mend}") from error


def _reason(error: Exception) -> str:
    words = one_line(" ".join(str(error).split()))[:160]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


@dataclass
class Captioner:
    """``captioner(pictures, prompts)``: a caption a picture, by greedy decoding."""

    model: Any
    processor: Any
    device: torch.device
    instruction: str = DESCRIBE
    max_tokens: int = 128

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        given: dict[str, Any] = {"images": list(pictures), "return_tensors": "pt"}
        chat = bool(getattr(self.processor, "chat_template", None))
        who = f"the captioner ({type(self.model).__name__})"
        said, mend = f"{who} does not answer to its chat template", "take a model whose processor fits it"
        if not chat:
            said = f"{who} says nothing of a picture alone"
            mend = "a chat model needs its processor's chat template (chat_template.jinja), take a folder that has it"
        with _asking(said, mend):
            if chat:
                given |= {"text": [self._question(prompt) for prompt in prompts], "padding": True}
            inputs = self.processor(**given).to(self.device, self.model.dtype)
            made = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_tokens)
        return [_plain(text) for text in self.processor.batch_decode(_new(made, inputs), skip_special_tokens=True)]

    def _question(self, prompt: str) -> str:
        # replaced, not formatted: a prompt or an instruction may hold braces
        words = self.instruction.replace("{prompt}", prompt)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
        found: str = self.processor.apply_chat_template([turn], add_generation_prompt=True)
        return found


class Perturber(Protocol):
    """Captions made worse; ``seed`` fixes the draws of a whole call."""

    def __call__(self, texts: Sequence[str], seed: int) -> list[str]: ...


@dataclass
class RulePerturber:
    """The fixed rules of `data.perturb`; ``base`` seeds them, the seed of a call does not matter."""

    level: str
    base: int = 0

    def __call__(self, texts: Sequence[str], seed: int) -> list[str]:
        return [perturb(text, LEVELS[self.level], self.base) for text in texts]


@dataclass
class ModelPerturber:
    """A text model, sampled with top-p 0.75 as DCPO does.

    ``dipper``: DIPPER's control codes, lexical diversity 40, 60 or 80 and order diversity 0 (its codes are 100 minus
    these), windows of three sentences, each after what was made of the ones before. Otherwise an instruction."""

    model: Any
    tokenizer: Any
    device: torch.device
    level: str
    dipper: bool
    max_tokens: int = MAX_LENGTH

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], seed: int) -> list[str]:
        windows = [_windows(text) if self.dipper else [text] for text in texts]
        done = [""] * len(texts)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for number in range(max(map(len, windows), default=0)):
                rows = [i for i, parts in enumerate(windows) if number < len(parts)]
                with _asking(f"the perturber ({type(self.model).__name__}) does not answer", "take another text model"):
                    made = self._generate([self._asked(windows[i][number], done[i]) for i in rows])
                for i, text in zip(rows, made, strict=True):
                    done[i] = f"{done[i]} {text}".strip()
        return done

    def _asked(self, text: str, before: str) -> str:
        if self.dipper:
            lexical = 100 - round(100 * LEVELS[self.level])
            head = f"{PREFIX} {before}".strip()
            return f"lexical = {lexical}, order = 100 {head} <sent> {text} </sent>"
        words = REWRITE.replace("{share}", str(round(100 * LEVELS[self.level]))).replace("{text}", text)
        if not getattr(self.tokenizer, "chat_template", None):
            return words
        turn = [{"role": "user", "content": words}]
        found: str = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return found

    def _generate(self, texts: list[str]) -> list[str]:
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        inputs.pop("token_type_ids", None)
        made = self.model.generate(
            **inputs, do_sample=True, top_p=TOP_P, top_k=0, num_beams=1, max_new_tokens=self.max_tokens
        )
        kept = _new(made, inputs)
        return [_plain(text) for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]


def load_captioner(
    name: str, device: torch.device, dtype: torch.dtype, instruction: str = DESCRIBE, max_tokens: int = 128
) -> Captioner:
    """An image-to-text model of transformers by folder or hub id. Raises UserError when there is none."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    what = f"captioner '{name}'"
    model = _loaded(AutoModelForImageTextToText, name, what, "an image-to-text model such as BLIP or LLaVA", dtype)
    processor = _loaded(AutoProcessor, name, what, "an image-to-text model with its processor")
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{what} has no image processor (preprocessor_config.json); give its whole folder")
    _pad_left(processor.tokenizer)
    return Captioner(model.to(device).eval(), processor, device, instruction, max_tokens)


def load_perturber(
    name: str, level: str, device: torch.device, dtype: torch.dtype, tokenizer: str | None = None, seed: int = 0
) -> Perturber:
    """``rules``, or a text model of transformers by folder or hub id; DIPPER's codes if its name has "dipper" in it.

    ``tokenizer``: where it is, when not with the model (DIPPER's is that of google/t5-v1_1-xxl).

    Raises UserError when there is none."""
    if name == RULES:
        return RulePerturber(level, seed)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    what = f"perturber '{name}'"
    both = _loaded(AutoConfig, name, what, "a text model, or 'rules'").is_encoder_decoder
    kind: Any = AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
    model = _loaded(kind, name, what, "a text-to-text or causal language model, or 'rules'", dtype)
    hint = "; name its tokenizer with --tokenizer (DIPPER's is google/t5-v1_1-xxl)"
    words = _loaded(AutoTokenizer, tokenizer or name, f"the tokenizer of {what}", "a tokenizer" + hint)
    if not both:
        _pad_left(words)
    return ModelPerturber(model.to(device).eval(), words, device, level, "dipper" in name.lower())


def _loaded(kind: Any, name: str, what: str, wanted: str, dtype: torch.dtype | None = None) -> Any:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(name, **({} if dtype is None else {"dtype": dtype}))
    except (
        OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError,
    ) as error:  # fmt: skip
        raise UserError(f"{what} cannot be loaded; give the folder or hub id of {wanted} ({_reason(error)})") from error
    finally:
        if shown:
            logging.enable_progress_bar()


def _pad_left(tokenizer: Any) -> None:
    """Generation goes on from the last place, which must be a word."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _new(made: torch.Tensor, inputs: Any) -> torch.Tensor:
    """The generated tokens (B, n) without the question, which decoders repeat before their answer."""
    asked = inputs.get("input_ids")
    if asked is None or made.shape[1] < asked.shape[1] or not torch.equal(made[:, : asked.shape[1]], asked):
        return made
    return made[:, asked.shape[1] :]


def _windows(text: str) -> list[str]:
    """A text in parts of three sentences."""
    found = sentences(text, ".!?")
    return [" ".join(found[i : i + WINDOW]) for i in range(0, len(found), WINDOW)]


def _plain(text: str) -> str:
    return " ".join(text.split())
