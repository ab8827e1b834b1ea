"""The command line: prompts from everywhere, output for people and programs, errors in one line."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import load_golden

import jaxinfer
from jaxinfer import LLM, GenerationRecord, SamplingParams
from jaxinfer.cli import info as facts
from jaxinfer.cli import main as cli

MODEL = str(load_golden("gqa").path)
SMALL = {"max_num_seqs": 2, "page_size": 8, "num_kv_pages": 32, "max_model_len": 64, "max_num_batched_tokens": 64}
FLAGS = [
    "--model",
    MODEL,
    *(str(word) for name, value in SMALL.items() for word in (f"--{name}".replace("_", "-"), value)),
]


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["jaxinfer", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def texts():
    """What the API gives for the prompts used here: four greedy tokens."""
    with LLM(MODEL, **SMALL) as llm:
        outputs = llm.generate(
            ["one", "two", "three\nfour"], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False
        )
    return {output.prompt: output.text for output in outputs}


GREEDY = ["--temperature", "0", "--max-tokens", "4"]


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_generate_prompts_from_arguments(run, texts, stream):
    code, out, _ = run("generate", "one", "two", *FLAGS, *GREEDY, *stream)
    assert (code, out) == (0, f"one{texts['one']}\ntwo{texts['two']}\n")


def test_generate_prompt_from_a_pipe_and_from_a_file(run, texts, tmp_path):
    (tmp_path / "prompt.txt").write_text("three\nfour\n")
    expected = texts["three\nfour"] + "\n"
    assert run("generate", *FLAGS, *GREEDY, "--no-echo", stdin="three\nfour\n")[1] == expected
    assert run("generate", *FLAGS, *GREEDY, "--no-echo", "--file", tmp_path / "prompt.txt")[1] == expected
    assert run("generate", *FLAGS, *GREEDY, "--lines", stdin="one\r\n\ntwo\n")[1].startswith(f"one{texts['one']}\ntwo")
    assert run("generate", *FLAGS, *GREEDY, "--lines", "--json", stdin="one\u2028two\x0cthree")[1].count("\n") == 1


def test_generate_json_is_one_object_a_line(run, texts):
    code, out, _ = run("generate", "one", "two", *FLAGS, *GREEDY, "--json", "--logprobs", 0)
    first, second = map(json.loads, out.splitlines())
    assert code == 0
    assert first["prompt"] == "one"
    assert first["outputs"][0]["text"] == texts["one"]
    assert len(second["outputs"][0]["logprobs"]) == 4
    out = run("generate", "one", *FLAGS, *GREEDY, "--json", "--stream")[1]
    records = [json.loads(line) for line in out.splitlines()]
    assert "".join(record["outputs"][0]["delta"] for record in records) == texts["one"]


def test_generate_settings_file_and_flags(run, texts, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(f"model: {MODEL}\ntemperature: 0\nmax_tokens: 9\nmax_model_len: 64\nnum_kv_pages: 4\n")
    assert run("generate", "one", "--config", file, "--max-tokens", 4)[1] == f"one{texts['one']}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["info", "--model", MODEL, "--draft-model", "demo"],
            1,
            "draft_model must have the vocabulary of the model",
        ),
        (["score"], 1, "no text: name a file or use a pipe"),
        (["generate", "x", *FLAGS, "--stream", "--n", "2"], 1, "--stream prints one text as it is made, got n 2"),
        (["generate", "x", "--structured", "{"], 1, "structured must be"),
        (["generate", "x", *FLAGS, "--structured", '{"regex": "("}'], 1, "structured.regex must be a grammar"),
        (["generate"], 1, "no prompt: pass one as an argument, with --file or through a pipe"),
        (
            ["generate", "x", "--model", "none"],
            1,
            "no such checkpoint directory: none (a hub id looks like owner/name)",
        ),
        (["generate", "x", "--model", __file__], 1, "is a file; expected a checkpoint directory or a hub id"),
        (["generate", "x", "--file", "y"], 1, "pass prompts as arguments or with --file, not both"),
        (["generate", "x", "--lines"], 1, "--lines splits a file or a pipe"),
        (["chat", "--n", "2"], 1, "a chat goes on with one reply, got n 2"),
        (["generate", "--file", "none.txt"], 1, "jaxinfer: --file none.txt cannot be read: No such file or directory"),
        (["generate", "--file", sys.executable], 1, "is not UTF-8 text"),
        (["generate", "x", "--top-p", "3"], 1, "top_p must be in (0, 1], got 3.0"),
        (["generate", "x", "--page-size", "9"], 1, "page_size must be a power of two, got 9"),
        (["generate", "x", "--config", "none.yaml"], 1, "no such settings file: none.yaml"),
        (["generate", "x", "--temprature", "3"], 2, "No such option: --temprature"),
        (["generate", "x", "--top-k", "many"], 2, "--top-k"),
        (["genrate", "x"], 2, "No such command 'genrate'"),
        (["bench", "latency", "--model", "none"], 1, "no such checkpoint directory: none"),
        (["generate", "x", "--record", "none/records"], 1, "No such file or directory: 'none/records'"),
        (["replay", "none.jsonl"], 1, "No such file or directory: 'none.jsonl'"),
        (["replay", __file__], 1, "test_main.py, line 1: not JSON"),
        (["info", "--model", "none"], 1, "no such checkpoint directory: none"),
        (["follow"], 1, "cannot find out address (JAXINFER_ADDRESS), num_processes"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_main_user_errors_are_one_line(run, arguments, code, message):
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert err.startswith("jaxinfer: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", bytes(range(256)), "is not a complete safetensors file"),
        ("config.json", b"\xff\x00\xfe", "is not valid JSON"),
        ("tokenizer.json", b"\x00\x01", "expected a tokenizer of the tokenizers library"),
    ],
)
def test_main_binary_rubbish_in_a_checkpoint_is_one_line(run, tmp_path, name, content, message):
    for file in load_golden("gqa").path.iterdir():
        (tmp_path / file.name).write_bytes(content if file.name == name else file.read_bytes())
    code, out, err = run("generate", "x", "--model", tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert name in err


def test_main_interrupt_exits_quietly(run, monkeypatch):
    def interrupt(*arguments, **fields):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxinfer.api.llm.LLM", interrupt)
    assert run("generate", "x") == (130, "", "")


def test_info_names_versions_devices_and_what_fits(run):
    code, out, _ = run("info", "--model", MODEL, "--max-model-len", 32)
    assert code == 0
    assert f"jaxinfer {jaxinfer.__version__}" in out
    assert "LlamaForCausalLM, 0.1 million parameters" in out
    record = json.loads(run("info", "--model", MODEL, "--json", "--max-model-len", 32)[1])
    few = json.loads(run("info", "--model", MODEL, "--json", "--num-kv-pages", 5, "--page-size", 8)[1])
    assert few["model"]["kv_tokens"] == 40
    model = record["model"]
    assert model["weight_bytes"] == 4 * model["num_parameters"]
    assert model["kv_bytes_per_token"] == 2 * 4 * 2 * 2 * 12  # K and V, float32, layers, kv heads, head_dim
    assert model["full_requests"] == model["kv_tokens"] // 64  # a page
    window = ("--sliding-window", 16, "--max-num-batched-tokens", 16, "--max-num-seqs", 1, "--page-size", 16)
    record = json.loads(run("info", "--model", MODEL, "--json", "--max-model-len", 128, *window)[1])
    assert record["model"]["full_requests"] == record["model"]["kv_tokens"] // 48  # not 128
    assert run("info")[1].count("\n") == 4


def test_generate_start_up_lines_say_which_model_is_the_draft(run, caplog):
    caplog.set_level("INFO", logger="jaxinfer")
    assert run("generate", "one", *FLAGS, *GREEDY, "--max-tokens", 1, "--draft-model", MODEL)[0] == 0
    model, draft = (line for line in caplog.messages if "LlamaForCausalLM" in line)
    assert (model[:24], draft[:30]) == ("model LlamaForCausalLM, ", "draft model LlamaForCausalLM, ")


@pytest.mark.parametrize("mesh", [[], ["--mesh", "2x2"]])
def test_info_counts_the_memory_of_a_draft_model(run, monkeypatch, mesh):
    monkeypatch.setattr(facts, "free_bytes", lambda *_, **__: 2**24)
    command = ["info", "--model", MODEL, "--max-model-len", 32, "--max-num-seqs", 4, *mesh]
    alone = json.loads(run(*command, "--json")[1])["model"]
    both = json.loads(run(*command, "--json", "--draft-model", MODEL)[1])["model"]
    draft = both["draft"]
    assert alone["draft"] is None and draft["num_parameters"] == alone["num_parameters"]
    weights = alone["weight_bytes"] if not mesh else 4 * alone["mesh"]["weight_bytes"]
    assert (draft["held_bytes"], draft["kv_bytes_per_token"]) == (weights, alone["kv_bytes_per_token"])
    page_bytes = 64 * 2 * alone["kv_bytes_per_token"]  # the model's and as large a one of the draft's
    assert both["kv_tokens"] == (2**24 - 2 * weights) // page_bytes * 64 < alone["kv_tokens"] / 2
    assert "draft model    LlamaForCausalLM, 0.1 million parameters" in run(*command, "--draft-model", MODEL)[1]


def test_generate_on_a_mesh_prints_the_text_of_one_device(run):
    command = ("generate", "In the beginning", "--max-tokens", 40, "--seed", 3, *FLAGS)
    _, alone, _ = run(*command)
    code, out, _ = run(*command, "--pipeline-parallel-size", 2, "--tensor-parallel-size", 2)
    assert code == 0 and out == alone
    assert len(out) > 40


def test_info_mesh_names_what_a_device_holds_and_sends(run):
    code, out, _ = run("info", "--model", MODEL, "--mesh", "2x2", "--max-model-len", 32, "--max-num-seqs", 4)
    assert code == 0
    assert re.search(r"2 pipeline stages x 2 tensor shards", out)
    assert re.search(r"sum_over_tensor +2 x over +2 ", out)  # one layer a stage
    record = run("info", "--model", MODEL, "--mesh", "2x2", "--max-model-len", 32, "--max-num-seqs", 4, "--json")[1]
    model = json.loads(record)["model"]
    mesh = model["mesh"]
    assert (mesh["num_stages"], mesh["num_shards"], mesh["rows"]) == (2, 2, 2)
    assert mesh["kv_bytes_per_token"] == model["kv_bytes_per_token"] / 4
    assert model["weight_bytes"] / 4 < mesh["weight_bytes"] < model["weight_bytes"] / 3  # norms are on all of a stage
    sent = next(volume for volume in mesh["volumes"] if volume["name"] == "send_to_next_stage")
    assert sent["sent_bytes"] == 2 * 4 * 48  # rows of 48 float32


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (["4", "--model", MODEL], "such as 2x4, got '4'"),
        (["0x2", "--model", MODEL], "such as 2x4, got '0x2'"),
        (["1x3", "--model", MODEL], "tensor_parallel_size must divide"),
        (["1x2"], "--mesh needs --model"),
        (["1x2", "--model", MODEL, "--tensor-parallel-size", "4"], "--mesh 1x2 contradicts tensor_parallel_size 4"),
    ],
)
def test_info_impossible_mesh_is_one_line(run, mesh, message):
    code, out, err = run("info", "--mesh", *mesh)
    assert code == 1 and not out
    assert message in err and err.count("\n") == 1


def test_python_m_jaxinfer_is_the_command():
    finished = subprocess.run(
        [sys.executable, "-m", "jaxinfer", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Continue prompts." in finished.stdout


def test_generate_record_and_replay_of_sampled_prompts_without_a_seed(run, tmp_path):
    file = tmp_path / "records.jsonl"
    sampled = [*FLAGS, "--temperature", "1", "--max-tokens", "6", "--no-echo", "--record", file]
    printed = run("generate", "one", "two", *sampled)[1] + run("generate", "three", *sampled, "--stream")[1]
    records = [GenerationRecord.from_json(line) for line in file.read_text().splitlines()]
    assert [record.prompt for record in records] == ["one", "two", "three"]
    assert printed == "".join(f"{record.outputs[0].text}\n" for record in records)
    code, out, err = run("replay", file)
    numbers = enumerate((len(record.outputs[0].token_ids) for record in records), start=1)
    assert (code, out) == (0, "".join(f"record {number}: same, {length} tokens\n" for number, length in numbers))
    assert " was " not in err


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["none.txt"], None, "jaxinfer: FILE none.txt cannot be read: No such file or directory\n"),
        ([], "", "jaxinfer: there is nothing to score: standard input is empty\n"),
        (
            [],
            "a\udcff",
            "jaxinfer: standard input is not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 1: invalid "
            "start byte\n",
        ),
        (["--window", "64"], "text", "jaxinfer: window must be in 2..63, got 64\n"),
        (["--window", "8", "--stride", "8"], "text", "jaxinfer: stride must be in 1..7, got 8\n"),
    ],
)
def test_score_checks_its_input_before_the_model_is_loaded(run, monkeypatch, arguments, text, message):
    monkeypatch.setattr("jaxinfer.api.llm.LLM", None)
    assert run("score", *arguments, *FLAGS, stdin=text) == (1, "", message)


def test_score_prints_what_perplexity_finds(run, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the house by the river, and the river by the house")
    with LLM(MODEL, **SMALL) as llm:
        found = llm.perplexity(file.read_text(), window=20, stride=10)
    options = [*FLAGS, "--window", 20, "--stride", 10]
    code, out, _ = run("score", file, *options, "--json")
    numbers = json.loads(out)
    assert (code, numbers["tokens"], numbers["logprob"]) == (0, found.num_tokens, pytest.approx(found.logprob))
    assert numbers["perplexity"] == pytest.approx(found.value)
    assert numbers["bits_per_byte"] == pytest.approx(found.bits_per_byte)
    code, out, _ = run("score", *options, stdin=file.read_text())
    assert (code, out.count("\n")) == (0, 1)
    assert f"perplexity {found.value:,.3f} a token, {found.bits_per_byte:.3f} bits a byte" in out


@pytest.fixture(scope="module")
def records():
    """Two records as JSON gives them."""
    params = SamplingParams(temperature=1, max_tokens=6, ignore_eos=True)
    with LLM(MODEL, **SMALL) as llm:
        outputs = llm.generate(["one", "two"], params, use_tqdm=False)
    return [output.record.to_json() for output in outputs]


def test_replay_says_where_a_token_differs_and_what_has_changed(run, records, tmp_path):
    file, second = tmp_path / "records.jsonl", json.loads(records[1])
    tokens = second["outputs"][0]["token_ids"]
    now = tokens[3]
    tokens[3] += 1
    second["provenance"]["versions"]["jax"] = "0.1"
    file.write_text(f"{records[0]}\n{json.dumps(second)}\n")
    code, out, err = run("replay", file, "--model", MODEL)
    same, different = out.splitlines()
    assert (code, same) == (1, "record 1: same, 6 tokens")
    expected = rf"record 2: completion 0 differs at token 3: recorded {now + 1} '.*', now {now} '.*'"
    assert re.fullmatch(expected, different)
    assert "jaxinfer: jax was 0.1, is now " in err


def test_replay_groups_records_with_xla_options_and_asks_for_a_tokenizer_that_was_an_object(run, records, tmp_path):
    file, fields = tmp_path / "records.jsonl", json.loads(records[0])
    fields["provenance"]["engine"]["xla_options"] = {"xla_cpu_enable_fast_math": False}
    file.write_text(f"{json.dumps(fields)}\n" * 2)
    assert run("replay", file, "--model", MODEL)[0] == 0
    fields["provenance"]["tokenizer"] = "<OwnTokenizer>"
    file.write_text(json.dumps(fields))
    message = "jaxinfer: record 1 was made with a tokenizer object, <OwnTokenizer>; name a tokenizer with --tokenizer\n"
    assert run("replay", file, "--model", MODEL) == (1, "", message)


@pytest.mark.parametrize(
    ("model", "message"),
    [(None, "record 1 has no model"), ("none", "no such checkpoint directory: none")],
)
def test_replay_without_its_model_is_one_line(run, records, tmp_path, model, message):
    fields = json.loads(records[0])
    fields["provenance"]["model"] = model
    (tmp_path / "records.jsonl").write_text(json.dumps(fields))
    code, out, err = run("replay", tmp_path / "records.jsonl")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


TEMPLATE = "{% for message in messages %}[{{ message.role[0] }}]{{ message.content }}{% endfor %}[a]"


def test_chat_keeps_the_conversation_until_reset(run, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    words = "one\n\ntwo\n/reset\none\n/quit\nnever\n"
    code, out, _ = run("chat", *FLAGS, *GREEDY, "--template", file, "--system", "s", stdin=words)
    with LLM(MODEL, **SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=4)
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}]
        first = llm.chat(messages, params, chat_template=TEMPLATE).text
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "two"}]
        second = llm.chat(messages, params, chat_template=TEMPLATE).text
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"no chat template in .*gqa: neither chat_template.jinja nor .*; pass --template FILE$"),
        (["--template", "none"], r"--template must be a file or the name of .* templates \(none\), got none$"),
        (["--template", sys.executable], "is not UTF-8 text"),
    ],
)
def test_chat_without_its_template_says_so_before_the_model_is_loaded(run, monkeypatch, arguments, message):
    monkeypatch.setattr("jaxinfer.api.llm.LLM", None)
    code, out, err = run("chat", *FLAGS, *arguments, stdin="hello\n")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(message, err.strip())


def test_chat_template_by_name_is_the_models(run, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "plain.jinja").write_text(TEMPLATE)
    named = run("chat", *FLAGS, *GREEDY, "--model", tmp_path / "model", "--template", "plain", stdin="one\n")
    file = tmp_path / "model" / "additional_chat_templates" / "plain.jinja"
    assert named[:2] == run("chat", *FLAGS, *GREEDY, "--template", file, stdin="one\n")[:2] and named[0] == 0


def test_chat_failed_message_is_forgotten_and_the_next_one_answered(run, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}" + TEMPLATE)
    code, out, err = run("chat", *FLAGS, *GREEDY, "--template", file, stdin=f"{'x' * 99}\none\ntwo\n/what\n")
    assert (code, out.count("\n")) == (1, 1)
    too_long, cut, refused, command = err.splitlines()[-4:]
    assert "prompt has " in too_long and too_long.endswith("; this message is forgotten")
    assert cut == "[cut at max_tokens 4; --max-tokens sets it]"
    assert "one only" in refused and refused.endswith("; this message is forgotten")
    assert command.startswith("no command /what: /reset forgets the conversation, /quit or Ctrl-D leaves")
