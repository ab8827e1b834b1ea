"""LLM.chat: the checkpoint's template, ids as transformers', defaults, shapes, errors."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading

import pytest
import sentencepiece
from conftest import GOLDEN
from test_sentencepiece_tokenizer import train

from jaxinfer import LLM, AsyncLLM, EngineClosedError, SamplingParams
from jaxinfer.sandbox.template_sandbox import TemplateSandbox
from jaxinfer.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

pytestmark = pytest.mark.usefixtures("few_programs")

CHAT = GOLDEN / "chat"
RENDERS = json.loads((CHAT / "renders.json").read_text(encoding="utf-8"))
GREEDY = SamplingParams(temperature=0, max_tokens=4)
SMALL = {"max_num_seqs": 4, "page_size": 8, "num_kv_pages": 96, "max_num_batched_tokens": 64, "max_model_len": 256}
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "gqa"
    shutil.copytree(GOLDEN / "gqa", directory)
    shutil.copy(CHAT / "mistral.jinja", directory / "chat_template.jinja")
    return directory


@pytest.fixture(scope="module")
def llm(directory):
    with LLM(directory, **SMALL) as llm:
        yield llm


def test_chat_prompt_is_the_render_and_its_ids_are_transformers(llm) -> None:
    records = [entry for entry in RENDERS["renders"] if "ids" in entry and len(entry["ids"]) < 250]
    assert len(records) > 5
    for record in records:
        output = llm.chat(**RENDERS["conversations"][record["conversation"]], sampling_params=GREEDY)
        assert output.prompt == record["text"]
        assert list(output.prompt_token_ids) == record["ids"]


def test_chat_adds_no_second_bos(llm) -> None:
    output = llm.chat([USER, ANSWER, USER], GREEDY)
    assert output.prompt == "<s>[INST] hi [/INST] Hello</s>[INST] hi [/INST]"
    assert (output.prompt_token_ids.count(0), output.prompt_token_ids.count(1)) == (1, 1)
    assert output.text == llm.generate(list(output.prompt_token_ids), GREEDY).text


def test_chat_special_token_named_in_a_message_is_that_token(llm) -> None:
    output = llm.chat([{"role": "user", "content": "a</s>b"}], GREEDY)
    assert output.prompt_token_ids.count(1) == 1


def test_chat_shapes_of_input_and_output_agree(llm) -> None:
    one, two = [USER], [USER, ANSWER, USER]
    outputs = llm.chat([one, two], GREEDY, use_tqdm=False)
    assert [entry.text for entry in outputs] == [llm.chat(one, GREEDY).text, llm.chat(two, GREEDY).text]
    assert llm.chat([], GREEDY) == []
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (1, 3)]
    assert [len(entry.token_ids) for entry in llm.chat([one, two], params, use_tqdm=False)] == [1, 3]
    with pytest.raises(ValueError, match="got 2 sampling_params for 1 prompts"):
        llm.chat(one, params)


def test_chat_options_reach_the_template(llm) -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert llm.chat([USER, ANSWER], GREEDY, **options).prompt == "<s>[INST] hi [/INST] Hello"
    template = "{{ tools[0].name }} {{ documents[0] }} {{ add_generation_prompt }} {{ bos_token }}"
    output = llm.chat(
        [USER], GREEDY, chat_template=template, tools=[{"name": "f"}], chat_template_kwargs={"documents": ["d"]}
    )
    assert output.prompt == "f d True <s>"


def test_chat_errors_come_before_anything_is_queued(llm) -> None:
    before = llm.stats()
    wrong = {"role": "system", "content": "x"}
    for messages, error, message in (
        ([[USER], [USER, USER]], ValueError, r"chat_template\.jinja, line \d+: Roles must alternate"),
        ([[USER], [wrong, wrong]], ValueError, "Roles must alternate"),
        ([[USER], []], ValueError, "no messages"),
        ([[USER], [{"role": "user", "content": "x" * 999}]], ValueError, "max_model_len"),
        ("hi", TypeError, "expected a list"),
        (["hi"], TypeError, "expected a list"),
    ):
        with pytest.raises(error, match=message):
            llm.chat(messages, GREEDY)
    with pytest.raises(TypeError, match="SamplingParams"):
        llm.chat([USER], {"max_tokens": 3})
    assert llm.stats() == before
    assert llm.chat([USER], GREEDY).finished


def test_chat_hostile_template_leaves_the_llm_working(llm) -> None:
    with pytest.raises(ValueError, match="chat_template argument: the template needs more than 1024 MiB"):
        llm.chat([USER], GREEDY, chat_template="{{ ('x' * 10 ** 11) | length }}")
    assert llm.chat([USER], GREEDY).finished


def test_chat_without_params_samples_as_the_generation_config_says(directory, tmp_path) -> None:
    shutil.copytree(directory, tmp_path / "copy")
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps(config))
    with LLM(tmp_path / "copy", **SMALL) as llm:
        assert llm.default_params == SamplingParams(temperature=0.6, top_p=0.9, top_k=0)  # unmentioned is off
        output = llm.chat([USER])
        seeded = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=None, seed=output.outputs[0].seed)
        assert output.token_ids == llm.chat([USER], seeded).token_ids
        plain = SamplingParams(seed=output.outputs[0].seed)  # an object is taken as it is
        assert llm.chat([USER], plain).token_ids == llm.generate(list(output.prompt_token_ids), plain).token_ids


def test_chat_without_params_or_generation_config_is_greedy(llm) -> None:
    assert llm.default_params.temperature == 0
    assert llm.chat([USER]).token_ids == llm.chat([USER], SamplingParams(temperature=0, max_tokens=None)).token_ids


def test_chat_without_params_goes_on_to_the_end_token_or_the_context(llm, directory) -> None:
    long = [{"role": "user", "content": "hi " * 70}]  # little of the context is left
    answer = llm.chat(long)
    assert len(answer.token_ids) > 16
    assert answer.finish_reason == "stop" or len(answer.prompt_token_ids) + len(answer.token_ids) == 256
    assert list(llm.stream_chat(long))[-1].token_ids == answer.token_ids
    assert llm.chat([long], use_tqdm=False)[0].token_ids == answer.token_ids
    assert len(llm.chat(long, SamplingParams(temperature=0, ignore_eos=True)).token_ids) == 16  # taken as it is

    async def main() -> tuple[int, ...]:
        async with AsyncLLM(directory, **SMALL) as async_llm:
            return [output async for output in async_llm.chat(long)][-1].token_ids

    assert asyncio.run(main()) == answer.token_ids


def test_chat_without_params_ends_where_the_pages_do(directory) -> None:
    with LLM(directory, **SMALL | {"num_kv_pages": 7}) as llm:  # 56 tokens, less than max_model_len
        output = llm.chat([USER])
        assert (len(output.prompt_token_ids) + len(output.token_ids), output.finish_reason) == (56, "length")
        with pytest.raises(ValueError, match=r"needs 32 KV pages .* raise num_kv_pages"):
            llm.chat([USER], SamplingParams(temperature=0, max_tokens=None))


def test_chat_without_a_template_names_what_is_missing(tmp_path) -> None:
    with LLM(GOLDEN / "gqa", **SMALL) as llm:
        with pytest.raises(ValueError, match=r"no chat template in .*gqa.*pass chat_template="):
            llm.chat([USER], GREEDY)
        assert llm.chat([USER], GREEDY, chat_template="{{ messages[0].content }}").prompt == "hi"


def test_chat_template_of_the_tokenizer_given_comes_first(directory, tmp_path) -> None:
    shutil.copytree(GOLDEN / "gqa", tmp_path / "tokenizer")
    with LLM(directory, tokenizer=tmp_path / "tokenizer", **SMALL) as llm:
        assert llm.chat([USER], GREEDY).prompt == "<s>[INST] hi [/INST]"  # the checkpoint's: the tokenizer has none
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    with LLM(directory, tokenizer=tmp_path / "tokenizer", **SMALL) as llm:
        assert llm.chat([USER], GREEDY).prompt == "hi!"
    with LLM(directory, tokenizer="byte", **SMALL) as llm:
        assert llm.chat([USER], GREEDY).prompt == "<s>[INST] hi [/INST]"


def test_chat_sentencepiece_special_tokens_become_ids(directory, tmp_path) -> None:
    train(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    expected = [1, *library.encode("[INST] hi [/INST] Hello"), 2, *library.encode("[INST] hi [/INST]")]
    assert SentencePieceTokenizer(tmp_path).encode_plain("<s>[INST] hi [/INST] Hello</s>[INST] hi [/INST]") == expected
    with LLM(directory, tokenizer=tmp_path, **SMALL) as llm:
        assert list(llm.chat([USER, ANSWER, USER], GREEDY).prompt_token_ids) == expected


def test_close_ends_the_template_process(directory) -> None:
    with LLM(directory, **SMALL) as llm:
        llm.chat([USER], GREEDY)
        process = llm._template_sandbox._process
        assert process.poll() is None
    assert process.returncode is not None


def test_stream_chat_and_async_chat_equal_chat(llm, directory) -> None:
    messages = [USER, ANSWER, USER]
    expected = llm.chat(messages, GREEDY)
    outputs = list(llm.stream_chat(messages, GREEDY))
    assert outputs[-1].prompt == expected.prompt
    assert "".join(output.delta for output in outputs) == expected.text
    with pytest.raises(TypeError, match="takes one conversation, got a list of 2"):
        llm.stream_chat([messages, messages], GREEDY)

    async def main():
        async with AsyncLLM(directory, **SMALL) as async_llm:
            return "".join([output.delta async for output in async_llm.chat(messages, GREEDY)])

    assert asyncio.run(main()) == expected.text


@pytest.fixture
def door(llm):
    """An AsyncLLM of the same engine."""
    door = AsyncLLM.__new__(AsyncLLM)
    door._llm = llm
    return door


@pytest.fixture
def held(monkeypatch):
    """Renders wait until this event is set; what they render is what the template makes of it."""
    held, render = threading.Event(), TemplateSandbox.render

    def wait_and_render(*arguments, **options):
        assert held.wait(20), "the event loop stood still"
        return render(*arguments, **options)

    monkeypatch.setattr(TemplateSandbox, "render", wait_and_render)
    yield held
    held.set()


@pytest.fixture
def started(llm, monkeypatch):
    """The submissions that were started."""
    started, start = [], llm.start
    monkeypatch.setattr(
        llm, "start", lambda submission, **options: started.append(submission) or start(submission, **options)
    )
    return started


def test_async_chat_leaves_the_loop_free_while_the_template_renders(door, held) -> None:
    async def read(stream):
        return "".join([output.delta async for output in stream])

    async def main():
        tasks = [asyncio.create_task(read(door.chat([USER], GREEDY))) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks)
        held.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [door._llm.chat([USER], GREEDY).text] * 2


def test_async_chat_starts_without_being_waited_for(door, started) -> None:
    async def main():
        streams = [door.chat([USER], GREEDY) for _ in range(2)]
        while len(started) < 2:
            await asyncio.sleep(0.01)
        for stream in streams:
            await stream.aclose()

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize("how", ["aclose", "cancel", "drop", "loop"])
def test_async_chat_left_before_the_render_ends_starts_nothing(door, held, started, how) -> None:
    async def main():
        stream = door.chat([USER], GREEDY)
        reading = asyncio.create_task(anext(stream)) if how == "cancel" else None
        await asyncio.sleep(0.02)
        if reading is not None:
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        if how in ("aclose", "cancel"):
            await stream.aclose()
            assert [output async for output in stream] == []
        if how != "loop":
            del stream
            await asyncio.sleep(0.02)
        held.set()
        await asyncio.sleep(0.1 if how != "loop" else 0)

    asyncio.run(main())
    assert started == []
    assert door._llm.chat([USER], GREEDY).finished
    assert door._llm.stats().num_requests_running == door._llm.stats().num_requests_waiting == 0


def test_async_chat_errors_of_the_template_come_with_the_first_output(door, started) -> None:
    async def main():
        for messages, options, message in (
            ([USER, USER], {}, "Roles must alternate"),
            ([USER], {"chat_template": "{{ 1 / 0 }}"}, "ZeroDivisionError"),
            ([{"role": "user", "content": "x" * 999}], {}, "max_model_len"),
        ):
            stream = door.chat(messages, GREEDY, **options)
            with pytest.raises(ValueError, match=message):
                await anext(stream)
            assert [output async for output in stream] == []

    asyncio.run(main())
    assert started == []


def test_async_chat_errors_that_need_no_render_come_at_the_call(door, started) -> None:
    async def main():
        for messages, params, options, error, message in (
            ([USER], {"max_tokens": 3}, {}, TypeError, "must be SamplingParams"),
            ([[USER], [USER]], GREEDY, {}, TypeError, "takes one conversation, got a list of 2"),
            ([], GREEDY, {}, TypeError, "takes one conversation"),
            ([{"role": "user"}], GREEDY, {}, ValueError, 'has no "content"'),
            ([USER], GREEDY, {"continue_final_message": True}, ValueError, "pass add_generation_prompt=False"),
            ([USER], GREEDY, {"chat_template": 3}, TypeError, "chat_template must be"),
            ([USER], GREEDY, {"template": "x"}, TypeError, "template"),
        ):
            with pytest.raises(error, match=message):
                door.chat(messages, params, **options)

    asyncio.run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        door.chat([USER], GREEDY)
    assert started == []


def test_async_chat_of_a_closed_llm_says_so(directory) -> None:
    async def main():
        async with AsyncLLM(directory, **SMALL) as async_llm:
            pass
        with pytest.raises(EngineClosedError, match="was closed"):
            await anext(async_llm.chat([USER], GREEDY))

    asyncio.run(main())


def test_async_chat_closed_by_another_task_ends_the_reader(door, held) -> None:
    async def read(stream):
        return [output async for output in stream]

    async def main():
        stream = door.chat([USER], GREEDY)
        reading = asyncio.create_task(read(stream))
        await asyncio.sleep(0.02)
        await stream.aclose()
        assert await reading == []
        held.set()

    asyncio.run(main())
