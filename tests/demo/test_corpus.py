"""The bundled model's text: read by chapter, split once and for all, tokenized without loss."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer.demo import corpus


def test_read_chapters_joins_the_verses_of_each(tmp_path) -> None:
    (tmp_path / "text").write_text("Ge1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus.\n1Jn2:1 My little.\n")
    assert corpus.read_chapters(tmp_path / "text") == ["In the beginning. And the earth.", "Thus.", "My little."]


@pytest.mark.parametrize("line", ["", "no verse", "Ge1 In the beginning"])
def test_read_chapters_other_line_names_it(line: str, tmp_path) -> None:
    (tmp_path / "text").write_text(f"Ge1:1 In the beginning.\n{line}\n")
    with pytest.raises(ValueError, match="line 2: expected a verse"):
        corpus.read_chapters(tmp_path / "text")


def test_split_holds_out_every_twentieth_chapter() -> None:
    chapters = [str(number) for number in range(65)]
    training, held_out = corpus.split(chapters)
    assert held_out == ["10", "30", "50"]
    assert sorted(training + held_out) == sorted(chapters) and not set(training) & set(held_out)


def test_token_stream_puts_every_chapter_between_bos_and_eos(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "VOCAB_SIZE", 300)
    chapters = ["In the beginning was the word. " * 9, "And the word was with them, é."]
    tokenizer = corpus.train_tokenizer(chapters, tmp_path / "tokenizer.model")
    stream = corpus.token_stream(tokenizer, chapters)
    assert stream.dtype == np.int32 and stream[0] == 1 and stream[-1] == 2
    ends = np.flatnonzero(stream == 2)
    texts = [tokenizer.decode(part[1:-1].tolist()) for part in np.split(stream, ends[:-1] + 1)]
    assert texts == chapters
