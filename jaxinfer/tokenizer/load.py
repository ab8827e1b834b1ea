"""Choosing the tokenizer of a checkpoint by the files that it has.

Owns: the choice.
Does not know: what is in the files.
"""

from __future__ import annotations

from pathlib import Path

from jaxinfer.tokenizer.file_tokenizer import FileTokenizer
from jaxinfer.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer


def load_tokenizer(directory: Path | str) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint directory.

    Returns:
      A FileTokenizer if there is a tokenizer.json, otherwise a SentencePieceTokenizer if there is a tokenizer.model,
      otherwise None.

    Raises:
      ValueError: a tokenizer file cannot be read; the message names it.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").exists():
        return FileTokenizer(directory)
    if (directory / "tokenizer.model").exists():
        return SentencePieceTokenizer(directory)
    return None
