"""sentencepiece tokenizer.model: ids and text against the sentencepiece library, BOS and EOS, errors."""

from __future__ import annotations

import json

import pytest
import sentencepiece
from conftest import GOLDEN

from jaxinfer import LLM, SamplingParams
from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer
from jaxinfer.tokenizer.load import load_tokenizer
from jaxinfer.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

TEXTS = ("In the beginning", "  two  spaces ", "", "naïve 日本 🙂", "a\nb")
CORPUS = "In the beginning there was a small river, and beside the river there was a small house. "


def train(directory, model_type: str = "bpe", vocab_size: int = 310):
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([CORPUS] * 20),
            model_writer=file,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )


@pytest.fixture(params=["bpe", "unigram"])
def directory(request, tmp_path):
    train(tmp_path, request.param)
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_encode_decode_equal_the_library(text: str, directory) -> None:
    tokenizer = load_tokenizer(directory)
    library = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.encode_plain(text) == library.encode(text)
    assert tokenizer.encode(text) == [1, *library.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("config", "before", "behind"),
    [({}, [1], []), ({"add_bos_token": False}, [], []), ({"add_eos_token": True}, [1], [2])],
)
def test_sentencepiece_config_decides_what_is_put_around(config, before, behind, directory) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = SentencePieceTokenizer(directory)
    assert tokenizer.encode("a small") == before + tokenizer.encode_plain("a small") + behind


def test_sentencepiece_special_tokens_by_name_or_left_out(directory) -> None:
    tokenizer = SentencePieceTokenizer(directory)
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.special_token_ids == {0, 1, 2}
    ids = [*tokenizer.encode("a small"), 2, *tokenizer.encode_plain("house"), tokenizer.vocab_size + 5]
    assert tokenizer.decode(ids) == "a small house"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> a small</s> house"
    assert tokenizer.token_text(2) == "</s>"


def test_sentencepiece_name_of_a_special_token_is_that_token(directory) -> None:
    tokenizer = SentencePieceTokenizer(directory)
    small, house = tokenizer.encode_plain("a small"), tokenizer.encode_plain("house")
    assert tokenizer.encode_plain("<s>a small</s><s>house") == [1, *small, 2, 1, *house]
    assert tokenizer.encode("<unk></s>") == [1, 0, 2]
    assert tokenizer.encode_plain("<s >") == sentencepiece.SentencePieceProcessor(
        model_file=str(directory / "tokenizer.model")
    ).encode("<s >")


def test_sentencepiece_text_grows_to_the_whole(directory) -> None:
    tokenizer = SentencePieceTokenizer(directory)
    prompt, output = tokenizer.encode("In the"), tokenizer.encode_plain("river 日本 naïve")
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=True)
    pieces = [detokenizer.push([token]) for token in output] + [detokenizer.finish()]
    assert "".join(pieces) == " river 日本 naïve"
    assert not any("\ufffd" in piece for piece in pieces)


def test_sentencepiece_broken_file_is_named(tmp_path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"tokenizer\.model: expected a sentencepiece model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model: no such file"):
        SentencePieceTokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [("added_tokens.json", {"<more>": 9999}), ("tokenizer_config.json", {"added_tokens_decoder": {"9999": {}}})],
)
def test_sentencepiece_added_tokens_are_refused(name: str, content, directory) -> None:
    (directory / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"adds token 9999 to the \d+ of tokenizer\.model"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", '{"<more>": "9999"}', "expected a token id for each text, got '9999'"),
        ("added_tokens.json", '{"<more>": null}', "expected a token id for each text, got None"),
        pytest.param("added_tokens.json", '{"<more>": ' + "[" * 200_000, "got one that is nested too deep", id="depth"),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["a"]}', r"added_tokens_decoder must be an object, got \["),
    ],
)
def test_sentencepiece_broken_list_of_added_tokens_is_named(name: str, content: str, message: str, directory) -> None:
    (directory / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        load_tokenizer(directory)


def test_llm_generates_text_with_a_sentencepiece_model(tmp_path) -> None:
    train(tmp_path)
    with LLM(GOLDEN / "gqa", tokenizer=tmp_path, max_model_len=32, page_size=8, num_kv_pages=8, max_num_seqs=1) as llm:
        output = llm.generate("In the", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    tokenizer = SentencePieceTokenizer(tmp_path)
    whole = tokenizer.decode([*output.prompt_token_ids, *output.token_ids])
    assert "In the" + output.text == whole
