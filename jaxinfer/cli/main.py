"""The command `jaxinfer` with its subcommands generate, replay, score, batch, chat, serve, info, launch,
follow, bench and ablate.

Owns: the commands, reading prompts, printing results, one-line error messages.
Does not know: how anything is computed; flags.py makes most flags from the settings dataclasses.

A command imports what needs JAX when it runs: --help and a mistake in the arguments do not wait for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from jaxinfer.api.scoring import check_windows
from jaxinfer.api.settings import split_settings
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.cli.ablate import ablate
from jaxinfer.cli.bench import app as bench
from jaxinfer.cli.bench_serve import bench_serve
from jaxinfer.cli.chosen_template import chosen_template
from jaxinfer.cli.flags import SETTINGS, takes_settings
from jaxinfer.cli.info_text import model_lines, system_lines
from jaxinfer.cli.lasting_imports import lasting_imports
from jaxinfer.cli.launch import become_process, is_launched, plan_processes, run_processes
from jaxinfer.cli.serve import serve
from jaxinfer.cli.terminal import enable_line_editing, read_message, remark
from jaxinfer.communication.connection import RefusedError
from jaxinfer.communication.process_group import GatherError
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.errors import EngineClosedError, RequestFailedError
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.api.llm import LLM

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
EXIT_DIFFERENT = 1
MAX_TOKENS = 128
MAX_REPLY_TOKENS = 1024
"""Defaults of max_tokens: MAX_TOKENS for generate, MAX_REPLY_TOKENS for chat."""
# The base class of usage errors. It is found through typer because some versions of typer bundle click and others use
# the installed one.
_UsageError: Any = typer.BadParameter.__mro__[1]
_USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    EngineClosedError,
    RequestFailedError,
    GatherError,
    RefusedError,
)

app = typer.Typer(
    help="LLM text generation in JAX and Flax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench.command(name="serve")(bench_serve)
app.add_typer(bench, name="bench")
app.command()(ablate)
app.command()(serve)
Model = Annotated[str | None, typer.Option(help=f"checkpoint directory or hub id (default: {DEMO}, the bundled model)")]
TokenizerFrom = Annotated[str | None, typer.Option(help='another tokenizer\'s directory or hub id, or "byte"')]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object a line")]


def main() -> None:
    """Runs the command line; an error that the user can mend is printed as one line on standard error."""
    sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        if is_launched(os.environ) and sys.argv[1:2] != ["launch"]:
            return _as_one_of_many()
        return app(standalone_mode=False) or 0
    except _UsageError as error:
        print(f"jaxinfer: {error.format_message()} (see --help)", file=sys.stderr)
        return EXIT_USAGE
    except BrokenPipeError:  # the reader has closed the pipe; without stdout Python does not flush into it at exit
        sys.stdout = None
        return EXIT_ERROR
    except _USER_ERRORS as error:
        print(f"jaxinfer: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED


def _as_one_of_many() -> int:
    """Runs the command as a process of a run: process 0 carries it out, the others take part in its steps."""
    with lasting_imports():
        from jaxinfer import distributed
        from jaxinfer.api.following import follow_run
    # The collectives of CPUs print on standard output when they connect; only the command's own output belongs there.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    distributed.initialize()
    run = distributed.current_run()
    if not isinstance(run, distributed.FollowerRun):
        return app(standalone_mode=False) or 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader says what Ctrl-C means
    return 0 if follow_run(run) else EXIT_ERROR


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def launch(
    command: Annotated[list[str], typer.Argument(help="a command of jaxinfer, or any other; put -- before it")],
    *,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="start so many on this machine; none: this is one that Slurm or the like has started"),
    ] = None,
    hosts: Annotated[
        str | None, typer.Option(help="all machines, the first of which leads; run the same command on each of them")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="on which process 0 listens")] = None,
) -> int:
    """Run a command in several processes that hold one model together: process 0 prints what a single one would.

    A script has to call jaxinfer.distributed.initialize() before it makes an LLM.
    """
    names = {entry.name or entry.callback.__name__ for entry in app.registered_commands if entry.callback}
    is_own = command[0] in names | {entry.name for entry in app.registered_groups}
    whole = [sys.executable, "-m", "jaxinfer", *command] if is_own else command
    if processes is None:
        if hosts is not None or port is not None:
            raise ValueError("--hosts and --port need --processes, how many to start on each machine")
        become_process(whole)
    machines = [] if hosts is None else [name.strip() for name in hosts.split(",") if name.strip()]
    members = plan_processes(num_processes=processes or 1, hosts=machines, port=port, environment=os.environ)
    return run_processes(whole, members)


@app.command()
def follow(
    *,
    address: Annotated[str | None, typer.Option(help="host:port of process 0")] = None,
    num_processes: Annotated[int | None, typer.Option(min=2, help="processes of the run")] = None,
    process_id: Annotated[int | None, typer.Option(min=1, help="number of this process")] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="share of every GPU's memory that JAX takes")
    ] = EngineConfig().gpu_memory_utilization,
) -> int:
    """Lend this machine's devices to the LLMs that process 0 of a run makes, until it ends.

    What is not given comes from JAXINFER_ variables, Slurm, Open MPI or Kubernetes; the secret from JAXINFER_SECRET.
    """
    with lasting_imports():
        from jaxinfer import distributed
        from jaxinfer.api.following import follow_run
    distributed.initialize(address, num_processes, process_id, gpu_memory_utilization=gpu_memory_utilization)
    run = distributed.current_run()
    if not isinstance(run, distributed.FollowerRun):
        raise ValueError("process 0 leads the run: it runs the program that makes the LLM; follow is for the others")
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # ends the whole run in good order
    return 0 if follow_run(run) else EXIT_ERROR


@app.command()
@takes_settings(*SETTINGS, defaults={"max_tokens": MAX_TOKENS})
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts; none reads one from --file or a pipe")] = None,
    *,
    model: Model = None,
    tokenizer: TokenizerFrom = None,
    file: Annotated[Path | None, typer.Option(help="file whose whole text is the prompt")] = None,
    lines: Annotated[bool, typer.Option(help="every line of the file or pipe is a prompt")] = False,
    stream: Annotated[bool, typer.Option(help="print text while it is made, one prompt after the other")] = False,
    as_json: AsJson = False,
    echo: Annotated[bool, typer.Option(help="print the prompt in front of its text")] = True,
    record: Annotated[Path | None, typer.Option(help="add a line a prompt to this file, for jaxinfer replay")] = None,
    **fields: Any,
) -> None:
    """Continue prompts."""
    texts = _read_prompts(prompts or [], file, lines=lines)
    sampling, config = split_settings(fields)
    with _opened(record) as records, _load(model, tokenizer, config) as llm:
        params = dataclasses.replace(llm.default_params, **sampling)
        if stream:
            if params.n > 1 and not as_json:
                raise ValueError(f"--stream prints one text as it is made, got n {params.n}; use --json or n 1")
            for text in texts:
                _print_stream(llm, text, params, records, as_json=as_json, echo=echo)
            return
        for output in llm.generate(texts, params):
            print(_as_json(output) if as_json else _as_text(output, echo=echo), flush=True)
            _write_record(output, records)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="records, as generate --record writes them")],
    *,
    model: Annotated[str | None, typer.Option(help="use this model instead of the recorded ones")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="use this tokenizer instead of the recorded ones")] = None,
) -> int:
    """Generate again what was recorded and compare the tokens; exits with 1 if any differ."""
    with lasting_imports():
        from jaxinfer.cli.replay import read_records, replay_records
    replays = replay_records(read_records(file), model=model, tokenizer=tokenizer)
    for warning in dict.fromkeys(itertools.chain.from_iterable(entry.warnings for entry in replays)):
        print(f"jaxinfer: {warning}", file=sys.stderr)
    for number, entry in enumerate(replays, start=1):
        print(f"record {number}: {entry}")
    return EXIT_DIFFERENT if any(entry.differences for entry in replays) else 0


@app.command()
@takes_settings(EngineConfig)
def score(
    file: Annotated[Path | None, typer.Argument(help="UTF-8 text; none reads a pipe")] = None,
    *,
    model: Model = None,
    tokenizer: TokenizerFrom = None,
    window: Annotated[
        int | None, typer.Option(help="tokens that see each other (default: as many as the model's context takes)")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="tokens from window to window (default: half a window)")] = None,
    as_json: AsJson = False,
    **fields: Any,
) -> None:
    """Say how well a model predicts a text: its log-probability, perplexity and bits a byte."""
    text = _read_text(file, missing="no text: name a file or use a pipe", name="FILE")
    if not text:
        raise ValueError(f"there is nothing to score: {file or 'standard input'} is empty")
    config = EngineConfig(**fields)
    with lasting_imports():
        from jaxinfer.cli.info import context
    check_windows(window, stride, max_model_len=context(model or DEMO, config))
    with _load(model, tokenizer, config) as llm:
        found = llm.perplexity(text, window=window, stride=stride)
    numbers = {
        "tokens": found.num_tokens,
        "logprob": found.logprob,
        "perplexity": found.value,
        "bits_per_byte": found.bits_per_byte,
    }
    if as_json:
        print(json.dumps(numbers))
    else:
        sizes = f"{found.num_tokens:,} tokens, log-probability {found.logprob:,.2f}"
        print(f"{sizes}, perplexity {found.value:,.3f} a token, {found.bits_per_byte:.3f} bits a byte")


@app.command()
@takes_settings(EngineConfig)
def batch(
    source: Annotated[Path, typer.Argument(help="requests, a line each, as OpenAI's batch API takes them")],
    target: Annotated[Path, typer.Argument(help="answers, a line each; those that it has already stay")],
    *,
    model: Model = None,
    tokenizer: TokenizerFrom = None,
    ray: Annotated[
        int | None, typer.Option(help="answer with so many LLMs on a Ray cluster; needs the extra [ray]", min=1)
    ] = None,
    **fields: Any,
) -> int:
    """Answer a file of requests; run it again to go on after an interruption. Exits with 1 if a request was wrong.

    The model that a request names is not looked at: --model answers all of them.
    """
    config = EngineConfig(**fields)
    with lasting_imports():
        from tqdm.auto import tqdm

        from jaxinfer.serve.batch import plan_batch, run_batch
    plan = plan_batch(source, target)
    remark(f"{plan.num_lines:,} requests, {len(plan.done):,} answered already")
    if not plan.num_left:
        return 0
    # The delay keeps the bar from the screen until the first answer.
    with tqdm(total=plan.num_lines, initial=len(plan.done), unit="request", disable=None, delay=1e-9) as bar:
        if ray is None:
            with _load(model, tokenizer, config) as llm:
                num_errors = run_batch(llm, plan, on_answer=bar.update)
        else:
            from jaxinfer.ray import run_batch as run_batch_on_ray  # needs Ray, which is optional

            arguments: dict[str, Any] = {"model": model or DEMO, "tokenizer": tokenizer, **dataclasses.asdict(config)}
            num_errors = run_batch_on_ray(plan, num_llms=ray, on_answer=bar.update, **arguments)
    if num_errors:
        remark(f"{num_errors:,} requests were wrong; their lines of {target} say why")
    return EXIT_ERROR if num_errors else 0


@app.command()
@takes_settings(*SETTINGS, defaults={"max_tokens": MAX_REPLY_TOKENS})
def chat(
    *,
    model: Model = None,
    tokenizer: TokenizerFrom = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    template: Annotated[
        str | None, typer.Option(help="Jinja file, or one of the model's templates by name, instead of its default one")
    ] = None,
    **fields: Any,
) -> int:
    """Talk to a model: one message a line, or a pasted text; /reset forgets the conversation, /quit or the end of input
    leaves, Ctrl-C ends a reply. The oldest turns are forgotten when the context is full."""
    sampling, config = split_settings(fields)
    if sampling.get("n", 1) != 1:
        raise ValueError(f"a chat goes on with one reply, got n {sampling['n']}; leave n out")
    with lasting_imports():
        from jaxinfer.api.llm import find_chat_templates
        from jaxinfer.cli.conversation import HELP, Conversation
    templates = find_chat_templates(tokenizer, model or DEMO)
    if template is None:
        templates.select(None, has_tools=False, knob="--template FILE")  # raises before a model is loaded
    chosen = chosen_template(template, templates, flag="--template")
    is_terminal = sys.stdin.isatty()
    with _load(model, tokenizer, config) as llm:
        params = dataclasses.replace(llm.default_params, **sampling)
        conversation = Conversation(llm, params, system=system, chat_template=chosen)
        if is_terminal:
            enable_line_editing()
            remark(HELP)
        all_answered = conversation.run(read_message, is_terminal=is_terminal)
    return 0 if all_answered or is_terminal else EXIT_ERROR


@app.command()
@takes_settings(EngineConfig)
def info(
    *,
    model: Model = None,
    mesh: Annotated[
        str | None, typer.Option(help="pipeline stages x tensor shards, such as 2x4; needs no such devices")
    ] = None,
    as_json: AsJson = False,
    **fields: Any,
) -> None:
    """Show versions, devices, memory; with --model, a model's size and what fits; with --mesh, what each device holds
    and sends."""
    with lasting_imports():
        from jaxinfer.cli import info as facts
    if mesh is not None:
        if model is None:
            raise ValueError("--mesh needs --model")
        for name, size in _parallel_sizes(mesh).items():
            if fields.setdefault(name, size) != size:
                raise ValueError(f"--mesh {mesh} contradicts {name} {fields[name]}; pass one of them")
    config = EngineConfig(**fields)
    system = facts.system_facts(config)
    found = None if model is None else facts.model_facts(model, config, system)
    if as_json:
        record = dataclasses.asdict(system) | {"model": None if found is None else dataclasses.asdict(found)}
        print(json.dumps(record))
        return
    print("\n".join([*system_lines(system), *([] if found is None else model_lines(found))]))


def _parallel_sizes(mesh: str) -> dict[str, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", mesh)
    if match is None:
        raise ValueError(f"--mesh must be pipeline stages x tensor shards, such as 2x4, got {mesh!r}")
    return {"pipeline_parallel_size": int(match[1]), "tensor_parallel_size": int(match[2])}


def _load(model: str | None, tokenizer: str | None, config: EngineConfig) -> LLM:
    with lasting_imports():
        from jaxinfer.api.llm import LLM
    return LLM(model or DEMO, tokenizer=tokenizer, **dataclasses.asdict(config))


def _read_prompts(prompts: list[str], file: Path | None, *, lines: bool) -> list[str]:
    """Returns the prompts from the arguments or --file, which exclude each other, or from a pipe if there are none."""
    if prompts and file is not None:
        raise ValueError("pass prompts as arguments or with --file, not both")
    if prompts and lines:
        raise ValueError("--lines splits a file or a pipe; each argument is a prompt anyway, leave --lines out")
    if prompts:
        return prompts
    text = _read_text(file, missing="no prompt: pass one as an argument, with --file or through a pipe", name="--file")
    if not lines:
        return [text.removesuffix("\n")]
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line]


def _read_text(file: Path | None, *, missing: str, name: str) -> str:
    """Reads a text from a file, or from a pipe if file is None.

    Args:
      file: the file.
      missing: the error message if there is neither a file nor a pipe.
      name: the argument or flag that gave the file, for error messages.
    """
    if file is None and sys.stdin.isatty():
        raise ValueError(missing)
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        # In the C locale and in UTF-8 mode Python reads bytes that are not UTF-8 as surrogates; decoding refuses them.
        return sys.stdin.read().encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file or 'standard input'} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{name} {file} cannot be read: {error.strerror}") from error


def _opened(record: Path | None) -> contextlib.AbstractContextManager[TextIO | None]:
    """Opens the file to add records to, if any, so that a wrong path fails before a model is loaded."""
    return contextlib.nullcontext() if record is None else Path(record).open("a", encoding="utf-8")


def _write_record(output: RequestOutput, records: TextIO | None) -> None:
    if records is not None:
        print(output.record.to_json(), file=records, flush=True)


def _print_stream(
    llm: LLM, prompt: str, params: SamplingParams, records: TextIO | None, *, as_json: bool, echo: bool
) -> None:
    print(prompt if echo and not as_json else "", end="", flush=True)
    for output in llm.stream(prompt, params):
        if output.finished:
            _write_record(output, records)
        if as_json:
            print(_as_json(output), flush=True)
        else:
            print(_shown(output.delta, output), end="", flush=True)
    print(end="" if as_json else "\n", flush=True)


def _as_text(output: RequestOutput, *, echo: bool) -> str:
    prompt = (output.prompt or "") if echo else ""
    return "\n".join(prompt + _shown(completion.text, output) for completion in output.outputs)


def _shown(text: str | None, output: RequestOutput) -> str:
    """The text, or the token ids in its place if there is no tokenizer."""
    return str(list(output.token_ids)) if text is None else text


def _as_json(output: RequestOutput) -> str:
    return json.dumps(output.as_dict(), ensure_ascii=False)
