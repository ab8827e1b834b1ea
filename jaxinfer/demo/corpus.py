"""The text of the bundled model: chapters of the King James Bible, their split and their tokens.

Owns: reading the output of Debian's `bible -f`, the fixed held-out split, the tokenizer's training, the token stream.
Does not know: models, optimisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import sentencepiece

VOCAB_SIZE = 4096
HELD_OUT_EVERY, HELD_OUT_FIRST = 20, 10
_VERSE = re.compile(r"(?P<chapter>.+?\d+):\d+ (?P<text>.*)")


def read_chapters(path: Path | str) -> list[str]:
    """The chapters of a text in the format of `bible -f "gen1:1-rev22:21"`, one verse per line ("Ge1:1 In the ...").

    Returns:
      One string per chapter: its verses in order, joined by spaces, without numbers.

    Raises:
      ValueError: a line is not a verse.
    """
    verses = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        verse = _VERSE.fullmatch(line.strip())
        if verse is None:
            raise ValueError(f'{path}, line {number}: expected a verse such as "Ge1:1 In the ...", got {line[:40]!r}')
        verses.append((verse["chapter"], verse["text"].strip()))
    return [" ".join(text for _, text in group) for _, group in groupby(verses, key=lambda verse: verse[0])]


def split(chapters: Sequence[str]) -> tuple[list[str], list[str]]:
    """The chapters to train on, and the held-out ones (every twentieth), which the tokenizer does not see either."""
    held_out = chapters[HELD_OUT_FIRST::HELD_OUT_EVERY]
    return [chapter for i, chapter in enumerate(chapters) if i % HELD_OUT_EVERY != HELD_OUT_FIRST], list(held_out)


def train_tokenizer(chapters: Iterable[str], file: Path) -> sentencepiece.SentencePieceProcessor:
    """Trains a BPE tokenizer with byte fallback and writes it to a file.

    Args:
      chapters: its training text.
      file: path of the tokenizer.model to write.
    """
    with file.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chapters),
            model_writer=model,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 16,
            num_threads=1,
            minloglevel=1,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def token_stream(tokenizer: sentencepiece.SentencePieceProcessor, chapters: Iterable[str]) -> np.ndarray:
    """The chapters' token ids, int32, one chapter after the other, each between BOS and EOS."""
    ids = tokenizer.encode(list(chapters), add_bos=True, add_eos=True)
    return np.concatenate([np.asarray(chapter, np.int32) for chapter in ids])
