"""What the demo CLIP learns from: captions of the batch, lists of answers in words, and views of the same place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from clipray.demo import prompts
from tools.demo_model.pool import KINDS, Pool

if TYPE_CHECKING:
    from tools.demo_model.compact import CompactClip

_CAPTION_SHARES = (0.6, 0.15, 0.25)  # how often a picture's first, second, third caption is used
_PLACE_WEIGHT = 0.5
_LABELS = prompts.class_labels()
_N_SHAPES = len(prompts.SHAPES)
_KIND_WORDS = {
    "single": ("a single shape", "one shape"),
    "group": ("several shapes", "a group of shapes"),
    "word": ("a written word", "a sign with words"),
    "place": ("a house", "a photo of a house"),
}


@dataclass(frozen=True)
class WordList:
    """A question about a picture: `wordings[answer]` are ways to put an answer, of which a step uses one."""

    name: str
    wordings: tuple[tuple[str, ...], ...]
    weight: float


def _class_wordings(label: str) -> tuple[str, ...]:
    styles = tuple(prompts.class_prompt(label, style) for style in prompts.PROMPT_STYLES)
    return (*styles, label, prompts.with_article(label), f"a picture of {prompts.with_article(label)}")


def _shape_wordings(shape: str) -> tuple[str, ...]:
    return (shape, f"a {shape}", f"a photo of a {shape}")


def _colour_wordings(colour: str) -> tuple[str, ...]:
    return (colour, f"something {colour}", f"{prompts.with_article(colour)} shape")


WORD_LISTS: tuple[WordList, ...] = (
    WordList("class", tuple(map(_class_wordings, _LABELS)), 1.0),
    WordList("shape", tuple(map(_shape_wordings, prompts.SHAPES)), 0.3),
    WordList("colour", tuple(map(_colour_wordings, prompts.COLOURS)), 0.3),
    WordList("ground", tuple((f"{prompts.with_article(name)} background",) for name in prompts.GROUNDS), 0.3),
    WordList("kind", tuple(_KIND_WORDS.values()), 0.1),
)


def list_texts() -> set[str]:
    """Every text that a list may use."""
    return {text for words in WORD_LISTS for wordings in words.wordings for text in wordings}


def _answers(pool: Pool, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """The right answer to each list, int64 [batch], -1 where there is none."""
    class_id, kind_id = pool.class_id[rows].astype(np.int64), pool.kind_id[rows]
    kind_words = list(_KIND_WORDS)
    kind_answer = np.array([kind_words.index("single" if kind == "crop" else kind) for kind in KINDS])
    answers = {
        "class": class_id,
        "shape": np.where(class_id < 0, -1, class_id % _N_SHAPES),
        "colour": np.where(class_id < 0, -1, class_id // _N_SHAPES),
        "ground": pool.ground_id[rows].astype(np.int64),
        "kind": kind_answer[kind_id],
    }
    return {name: torch.from_numpy(answer) for name, answer in answers.items()}


@dataclass(frozen=True)
class TextBatch:
    """Texts of a step. `texts`: captions of the batch (each once), then one wording of every answer of every list.

    `caption_of` int64 [batch]: which caption is whose; `also_true` bool [batch, n_captions]: other captions that fit
    a picture as well, left out of the loss; `answers`: int64 [batch] a list; `place_number` int64 [batch], -1: none.
    """

    texts: list[str]
    n_captions: int
    caption_of: torch.Tensor
    also_true: torch.Tensor
    answers: dict[str, torch.Tensor]
    place_number: torch.Tensor


def text_batch(pool: Pool, rows: np.ndarray, rng: np.random.Generator) -> TextBatch:
    """Choose one caption a picture and one wording an answer."""
    ids, numbers = pool.caption_ids[rows], np.arange(len(rows))
    caption_ids = ids[numbers, rng.choice(len(_CAPTION_SHARES), size=len(rows), p=_CAPTION_SHARES)]
    caption_ids = np.where(caption_ids < 0, ids[:, 0], caption_ids)
    unique, caption_of = np.unique(caption_ids, return_inverse=True)
    captions = [pool.captions[i] for i in unique]
    short = {prompts.with_article(label): number for number, label in enumerate(_LABELS)}
    text_class = np.array([short.get(caption, -2) for caption in captions])
    also_true = text_class[None, :] == pool.class_id[rows][:, None]
    also_true[numbers, caption_of] = False
    wordings = [ways for words in WORD_LISTS for ways in words.wordings]
    return TextBatch(
        texts=captions + [ways[int(rng.integers(len(ways)))] for ways in wordings],
        n_captions=len(captions),
        caption_of=torch.from_numpy(caption_of.reshape(-1)),
        also_true=torch.from_numpy(also_true),
        answers=_answers(pool, rows),
        place_number=torch.from_numpy(pool.place_number[rows].astype(np.int64)),
    )


def _contrast(logits: torch.Tensor, batch: TextBatch) -> torch.Tensor:
    """InfoNCE both ways; all pictures with a caption are right for it."""
    logits = logits.masked_fill(batch.also_true, -1e4)
    positive = F.one_hot(batch.caption_of, batch.n_captions).float().T  # [n_captions, batch]
    to_image = F.cross_entropy(logits.T, positive / positive.sum(1, keepdim=True))
    return (F.cross_entropy(logits, batch.caption_of) + to_image) / 2


def _listed(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over a list, for the pictures that have a right answer."""
    known = (answer >= 0).float()
    losses = F.cross_entropy(logits, answer.clamp(min=0), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def _same_place(logits: torch.Tensor, place_number: torch.Tensor) -> torch.Tensor:
    """InfoNCE between pictures [batch, batch]: the other views of a place against everything else."""
    itself = torch.eye(len(logits), dtype=torch.bool)
    same = (place_number[:, None] == place_number[None]) & (place_number >= 0)[:, None] & ~itself
    seen_again = same.any(dim=1)
    if not seen_again.any():
        return logits.new_zeros(())
    target = same[seen_again].float()
    return F.cross_entropy(logits.masked_fill(itself, -1e4)[seen_again], target / target.sum(1, keepdim=True))


def clip_loss(model: CompactClip, pixels: torch.Tensor, batch: TextBatch) -> torch.Tensor:
    """The loss of a step: captions, the word lists, and views of the same place."""
    image_features, text_features = model.encode_image(pixels), model.encode_text(batch.texts)
    scale = model.clip.logit_scale.float().clamp(max=4.6052).exp()
    logits = scale * image_features @ text_features.T  # [batch, n_texts]
    captions, *lists = logits.split([batch.n_captions, *(len(words.wordings) for words in WORD_LISTS)], dim=1)
    loss = _contrast(captions, batch)
    for words, part in zip(WORD_LISTS, lists, strict=True):
        loss = loss + words.weight * _listed(part, batch.answers[words.name])
    return loss + _PLACE_WEIGHT * _same_place(scale * image_features @ image_features.T, batch.place_number)
