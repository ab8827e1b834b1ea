"""AsyncLLM: the same texts as LLM, from many tasks and loops, cancelled in every way."""

import asyncio
import threading

import pytest
from conftest import load_golden
from held_steps import few_steps
from safetensors.numpy import load_file

from jaxinfer import LLM, AsyncLLM, BeamSearchParams, EngineClosedError, SamplingParams
from jaxinfer.checkpoint.directory import read_json

pytestmark = pytest.mark.usefixtures("few_programs")

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
SMALL = {"max_num_seqs": 4, "page_size": 8, "num_kv_pages": 512, "max_num_batched_tokens": 64, "max_model_len": 250}


@pytest.fixture(scope="module")
def path():
    return load_golden("gqa").path


@pytest.fixture(scope="module")
def llm(path):
    llm = AsyncLLM(path, **SMALL)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def expected(path):
    with LLM(path, **SMALL) as llm:
        return {prompt: llm.generate(prompt, GREEDY).text for prompt in map(str, range(6))}


async def text_of(llm, prompt, params=GREEDY):
    deltas = [output.delta async for output in llm.generate(prompt, params)]
    return "".join(deltas)


async def until_idle(llm):
    """The engine drops an aborted request before its next step, which another request brings about."""
    await text_of(llm, "0")
    stats = llm.stats()
    assert stats.num_requests_running == stats.num_requests_waiting == 0


def test_generate_many_tasks_equal_one_by_one(llm, expected):
    async def main():
        return await asyncio.gather(*(text_of(llm, prompt) for prompt in expected))

    assert asyncio.run(main()) == list(expected.values())
    assert asyncio.run(main()) == list(expected.values()), "a second event loop"


def test_beam_search_and_score_beside_each_other_equal_llm(llm, path):
    params = BeamSearchParams(beam_width=2, max_tokens=5, num_return_sequences=2)

    async def main():
        return await asyncio.gather(llm.beam_search("the house", params), llm.score("the house"))

    searched, scored = asyncio.run(main())
    with LLM(path, **SMALL) as plain:
        expected = plain.beam_search("the house", params)
        alone = plain.score("the house")
    assert [entry.text for entry in searched.outputs] == [entry.text for entry in expected.outputs]
    # Side by side they are rows of other batches, which may round differently.
    assert [entry.score for entry in searched.outputs] == pytest.approx([entry.score for entry in expected.outputs])
    assert logprobs_of(scored) == pytest.approx(logprobs_of(alone))


def logprobs_of(output):
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [found[token_id].logprob for token_id, found in pairs]


def test_generate_from_loops_in_several_threads(llm, expected):
    found = {}

    def ask(prompt):
        found[prompt] = asyncio.run(text_of(llm, prompt))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_generate_cancelled_task_aborts_the_request(llm):
    async def main():
        with few_steps(llm._llm):
            task = asyncio.create_task(text_of(llm, "hello", ENDLESS))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until_idle(llm)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["aclose", "break"])
def test_generate_left_early_aborts_the_request(llm, how):
    async def main():
        with few_steps(llm._llm):
            stream = llm.generate("hello", ENDLESS)
            async for output in stream:
                assert not output.finished
                break
        if how == "aclose":
            await stream.aclose()
            assert [output async for output in stream] == []
        del stream
        await until_idle(llm)

    asyncio.run(main())


def test_generate_closed_by_another_task_ends_the_one_that_waits(llm):
    async def main():
        async def read():
            return [output.finished async for output in stream]

        with few_steps(llm._llm):
            stream = llm.generate("hello", ENDLESS)
            reader = asyncio.create_task(read())
            await asyncio.sleep(0.05)
            await stream.aclose()
            assert True not in await asyncio.wait_for(reader, 30)
        await until_idle(llm)

    asyncio.run(main())


def test_generate_errors_come_at_the_call(llm):
    async def main():
        with pytest.raises(ValueError, match="prompt is empty"):
            llm.generate([])
        with pytest.raises(TypeError, match="must be SamplingParams"):
            llm.generate("a", {"max_tokens": 3})

    asyncio.run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        llm.generate("hello", GREEDY)


def test_close_wakes_those_who_wait(path):
    async def main():
        llm = AsyncLLM(path, **SMALL)
        with few_steps(llm._llm):
            async with llm:
                task = asyncio.create_task(text_of(llm, "hello", ENDLESS))
                await asyncio.sleep(0.05)
        with pytest.raises(EngineClosedError, match="was closed"):
            await task
        with pytest.raises(EngineClosedError):
            llm.generate("hello", GREEDY)

    asyncio.run(main())


def test_loop_that_ends_early_leaves_the_engine_to_others(llm, expected):
    async def start():
        llm.generate("hello", ENDLESS)

    asyncio.run(start())
    assert asyncio.run(text_of(llm, "1")) == expected["1"]


def test_from_params_equals_the_checkpoint(path, expected):
    fields = read_json(path / "config.json")
    llm = AsyncLLM.from_params(fields, load_file(path / "model.safetensors"), tokenizer=path, **SMALL)
    assert asyncio.run(text_of(llm, "1")) == expected["1"]
    llm.close()


def test_llm_generate_works_inside_a_running_loop(path, expected):
    async def main():
        with LLM(path, **SMALL) as llm:
            return llm.generate("1", GREEDY).text, "".join(output.delta for output in llm.stream("1", GREEDY))

    assert asyncio.run(main()) == (expected["1"], expected["1"])
