"""The commands of `jaxinfer bench`: each runs one benchmark and writes its result as a table, JSON and a plot.

Owns: the commands' flags and their defaults.
Does not know: how anything is measured. Each benchmark is a module of jaxinfer.bench, which also renders its result; a
command imports it when it runs, since --help and the other commands need neither it nor JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.cli.flags import takes_settings, writable_file
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.validation import require_int

if TYPE_CHECKING:
    from jaxinfer.bench.session import Session, Target

app = typer.Typer(no_args_is_help=True, help="Measures the engine on this machine.")

Model = Annotated[str, typer.Option(help="checkpoint directory, hub id, or demo")]
RandomWeights = Annotated[
    Path | None, typer.Option(help="config.json (or a directory with one) to measure with random weights instead")
]
JsonFile = Annotated[
    str,
    typer.Option("--json", callback=writable_file, help="write the result with versions and settings; - for stdout"),
]
Plot = Annotated[Path | None, typer.Option(callback=writable_file, help="write a PNG (needs matplotlib)")]
BatchSizes = Annotated[str, typer.Option("--batch-size", help="requests at once; several separated by commas")]
PromptLen = Annotated[int, typer.Option(min=1, help="tokens of each prompt")]
OutputLen = Annotated[int, typer.Option(min=1, help="new tokens of each request")]
Repeats = Annotated[int, typer.Option(min=1, help="timed runs, after one that is not")]

_MIXED_SEQS = 16


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a command that also takes EngineConfig's fields."""
    return app.command()(takes_settings(EngineConfig)(function))


@_command
def latency(
    *,
    model: Model = DEMO,
    random_weights: RandomWeights = None,
    batch_sizes: BatchSizes = "1,8,32",
    prompt_len: PromptLen = 128,
    output_len: OutputLen = 64,
    repeats: Repeats = 3,
    json_file: JsonFile = "",
    plot: Plot = None,
    **fields: Any,
) -> None:
    """Median times of prefill and decode for fixed batches, without the warm-up; end tokens are ignored."""
    from jaxinfer.bench import latency as latency_bench

    sizes, target = _sizes(batch_sizes), _target(model, random_weights, fields)
    with _session(target, fields, plot, num_seqs=max(sizes), num_tokens=prompt_len + output_len) as session:
        result = latency_bench.measure(
            session, sizes, prompt_len=prompt_len, output_len=output_len, repeats=repeats, seed=target.seed
        )
        emit(latency_bench, result, _settings(target, session.config), json_file, plot)


@_command
def throughput(
    *,
    model: Model = DEMO,
    random_weights: RandomWeights = None,
    trace: Annotated[
        Path | None, typer.Option(help='JSONL, one {"prompt_len", "output_len"[, "arrival_time"]} a line')
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="requests drawn where no trace is given")] = 128,
    distribution: Annotated[str, typer.Option(help="of the lengths: uniform, lognormal")] = "uniform",
    prompt_len: PromptLen = 128,
    output_len: OutputLen = 64,
    spread: Annotated[float, typer.Option(help="of the lengths: half width over mean, or lognormal's sigma")] = 0.5,
    prefix_len: Annotated[int, typer.Option(min=0, help="leading tokens that all prompts share")] = 0,
    request_rate: Annotated[
        float | None, typer.Option(help="Poisson arrivals per second; without it the trace's own, or all at once")
    ] = None,
    json_file: JsonFile = "",
    plot: Plot = None,
    **fields: Any,
) -> None:
    """Serve a trace of requests and report rates, time to first token, between tokens and end to end; for drawn
    requests prompt_len and output_len are means."""
    from jaxinfer.bench import throughput as throughput_bench
    from jaxinfer.bench import workload

    target = _target(model, random_weights, fields)
    drawn = {"distribution": distribution, "prompt_len": prompt_len, "output_len": output_len, "spread": spread}
    entries = workload.read_trace(trace) if trace else workload.draw_trace(num_requests, seed=target.seed, **drawn)
    if request_rate is not None:
        entries = workload.with_poisson_arrivals(entries, request_rate, target.seed)
    longest = max(entry.prompt_len + entry.output_len for entry in entries)
    with _session(target, fields, plot, num_seqs=EngineConfig().max_num_seqs, num_tokens=longest) as session:
        result = throughput_bench.measure(session, entries, prefix_len=prefix_len, seed=target.seed)
        workload_settings = {"trace": trace, "request_rate": request_rate, "prefix_len": prefix_len}
        workload_settings |= {} if trace else {"num_requests": num_requests} | drawn
        emit(throughput_bench, result, _settings(target, session.config) | workload_settings, json_file, plot)


@_command
def startup(
    *,
    model: Model = DEMO,
    random_weights: RandomWeights = None,
    prompt_len: PromptLen = 128,
    repeats: Annotated[int, typer.Option(min=1, help="pairs of processes")] = 1,
    warmup: Annotated[bool, typer.Option(help="also compile every program, as LLM.warmup does")] = False,
    json_file: JsonFile = "",
    **fields: Any,
) -> None:
    """Time of import, loading, compilation and first token in fresh processes, with an empty and with a filled
    compilation cache."""
    from jaxinfer.bench import report
    from jaxinfer.bench import startup as startup_bench

    target = _target(model, random_weights, fields)
    target.fields()  # raises for a wrong path before a process is started
    report.warn_if_busy()
    result = startup_bench.measure(target, fields, prompt_len=prompt_len, repeats=repeats, warmup=warmup)
    settings = {**target.record(), "engine": fields, "prompt_len": prompt_len}
    emit(startup_bench, result, settings, json_file)


@_command
def roofline(
    *,
    model: Model = DEMO,
    random_weights: RandomWeights = None,
    batch_sizes: BatchSizes = "1,8,32",
    context: Annotated[int, typer.Option(min=1, help="KV positions a decode step reads per row")] = 256,
    prefill_lens: Annotated[
        str, typer.Option("--prefill-len", help="tokens of a prompt that is prefilled alone; several with commas")
    ] = "256",
    num_steps: Annotated[int, typer.Option(min=1, help="launches of decode steps timed at once")] = 16,
    repeats: Repeats = 3,
    read_mib: Annotated[int, typer.Option(min=0, help="MiB read for the bandwidth; 0: 512 on CPU, 4096 elsewhere")] = 0,
    matmul_size: Annotated[
        int, typer.Option(min=0, help="rows of the square product; 0: 2048 on CPU, 8192 elsewhere")
    ] = 0,
    profile: Annotated[
        bool | None, typer.Option(help="record some steps with the profiler; on all but CPU unless told otherwise")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="folder for the profiler's files")] = None,
    json_file: JsonFile = "",
    plot: Plot = None,
    **fields: Any,
) -> None:
    """Times of decode steps and prefills beside the lower bound from the device's measured bandwidth and matmul
    rate."""
    from jaxinfer.bench import roofline as roofline_bench
    from jaxinfer.wrappers.chains import CHAIN_LEN

    sizes, target = _sizes(batch_sizes), _target(model, random_weights, fields)
    lengths = _whole_numbers("prefill_len", prefill_lens)
    is_cpu = _platform() == "cpu"
    read_bytes, usual_size = roofline_bench.rate_sizes(_platform())
    chain = fields.get("steps_per_launch") or (1 if is_cpu else CHAIN_LEN)
    steps = (num_steps * (repeats + 1) + roofline_bench.PROFILED_STEPS) * chain
    longest = max(context + steps, max(lengths) + 1)
    with _session(target, fields, plot, num_seqs=max(sizes), num_tokens=longest) as session:
        result = roofline_bench.measure(
            session,
            sizes,
            context=context,
            prefill_lens=lengths,
            num_steps=num_steps,
            repeats=repeats,
            read_bytes=read_mib * 2**20 or read_bytes,
            matmul_size=matmul_size or usual_size,
            seed=target.seed,
            profiled=not is_cpu if profile is None else profile,
            keep=keep,
        )
        emit(roofline_bench, result, _settings(target, session.config), json_file, plot)


@_command
def profile(
    *,
    model: Model = DEMO,
    random_weights: RandomWeights = None,
    batch_sizes: BatchSizes = "1,8,32",
    context: Annotated[int, typer.Option(min=1, help="KV positions a decode step reads per row")] = 160,
    num_steps: Annotated[int, typer.Option(min=1, help="steps of one turn; every part runs as often")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="turns, after one that is not counted")] = 5,
    json_file: JsonFile = "",
    plot: Plot = None,
    **fields: Any,
) -> None:
    """Where the time of a decode step goes: matrix products, head, attention, cache write, sampler, host."""
    from jaxinfer.bench import profile as profile_bench

    sizes, target = _sizes(batch_sizes), _target(model, random_weights, fields)
    longest = context + (num_steps + 1) * (repeats + 3)
    with _session(target, fields, plot, num_seqs=max(sizes), num_tokens=longest) as session:
        result = profile_bench.measure(
            session, sizes, context=context, num_steps=num_steps, repeats=repeats, seed=target.seed
        )
        emit(profile_bench, result, _settings(target, session.config), json_file, plot)


@_command
def growth(
    *,
    random_weights: Annotated[Path, typer.Option(help="config.json (or a directory with one) of the shape to measure")],
    batch_sizes: BatchSizes = "1,8,16,32",
    contexts: Annotated[
        str, typer.Option("--context", help="KV positions a row; several with commas")
    ] = "64,128,256,512",
    layers: Annotated[str, typer.Option(help="several with commas; none: a third, two thirds and all")] = "",
    fixed_batch: Annotated[int, typer.Option(min=1, help="rows where contexts and layers are varied")] = 8,
    fixed_context: Annotated[int, typer.Option(min=1, help="positions where rows and layers are varied")] = 128,
    num_steps: Annotated[int, typer.Option(min=1, help="steps of one timed run")] = 8,
    repeats: Repeats = 3,
    json_file: JsonFile = "",
    plot: Plot = None,
    **fields: Any,
) -> None:
    """How a decode step's time grows with batch, context and layers, beside the growth of its least time."""
    from jaxinfer.bench import growth as growth_bench
    from jaxinfer.bench import report
    from jaxinfer.bench.session import Session, engine_config
    from jaxinfer.models.registry import parse_model_config

    target = _target(DEMO, random_weights, fields)
    config = parse_model_config(target.fields())
    thirds = ",".join(str(-(-config.num_layers * part // 3)) for part in (1, 2, 3))
    plan = growth_bench.Growth(
        batch_sizes=tuple(_sizes(batch_sizes)),
        contexts=tuple(_whole_numbers("context", contexts)),
        layers=tuple(_whole_numbers("layers", layers or thirds)),
        batch_size=fixed_batch,
        context=fixed_context,
        num_steps=num_steps,
        repeats=repeats,
        seed=target.seed,
    )
    if plot is not None:
        report.require_matplotlib()  # before minutes of measuring
    engine = engine_config(fields, config, num_seqs=plan.most_rows, num_tokens=plan.longest)
    report.warn_if_busy()
    result = growth_bench.measure(plan, config, lambda config: Session(config, target.store(config), engine))
    emit(growth_bench, result, _settings(target, engine), json_file, plot)


@_command
def compare(
    *,
    model: Model = DEMO,
    random_weights: RandomWeights = None,
    peer: Annotated[str, typer.Option(help="transformers or llama.cpp")] = "transformers",
    batch_sizes: BatchSizes = "1,8,32",
    prompt_len: PromptLen = 64,
    output_len: OutputLen = 64,
    repeats: Repeats = 3,
    apart: Annotated[
        bool, typer.Option(help="the peer first, in a process of its own, each side with random weights of its own")
    ] = False,
    peer_limit: Annotated[float, typer.Option(help="with --apart: seconds after which the peer is stopped")] = 600,
    trace: Annotated[
        int, typer.Option(min=0, help="with --apart, instead of batches: requests served by continuous batching")
    ] = 0,
    mixed: Annotated[
        int, typer.Option(min=0, help="instead of batches: requests of different lengths, max_num_seqs (16) at once")
    ] = 0,
    spread: Annotated[
        float, typer.Option(help="with --mixed, whose prompt_len and output_len are means: half width over mean")
    ] = 0.88,
    json_file: JsonFile = "",
    plot: Plot = None,
    **fields: Any,
) -> None:
    """Run the same prompts and weights, greedily, through another engine and through this one, in turns."""
    from jaxinfer.bench import compare as compare_bench
    from jaxinfer.bench import compare_apart as apart_bench
    from jaxinfer.bench import compare_mixed as mixed_bench
    from jaxinfer.bench import peers, workload
    from jaxinfer.bench.random_weights import RandomStore, write_checkpoint
    from jaxinfer.bench.session import Target
    from jaxinfer.models.registry import parse_model_config
    from jaxinfer.wrappers.assembly import choose_dtype

    sizes, target = _sizes(batch_sizes), _target(model, random_weights, fields)
    if apart and mixed:
        raise ValueError("mixed takes turns with the peer; leave apart out, or use its trace")
    quantization = fields.get("quantization")
    if apart and quantization is not None:
        raise ValueError(f"a peer apart is run without quantization, got {quantization!r}; leave one of the two out")
    if apart:
        # The peer runs first, in another process, and needs the device's memory: JAX must not preallocate it here.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        works = [
            apart_bench.Work(num_requests=count, is_trace=bool(trace), prompt_len=prompt_len, output_len=output_len)
            for count in ([trace] if trace else sizes)
        ]
        max_num_seqs = fields.get("max_num_seqs") or max(work.num_requests for work in works)
        order = apart_bench.PeerOrder(
            peer=peer,
            fields=target.fields(),
            dtype=choose_dtype(EngineConfig(**fields).dtype, _platform()).name,
            platform=_platform(),
            works=tuple(works),
            max_num_seqs=max_num_seqs,
            repeats=repeats,
            seed=target.seed,
            limit_s=peer_limit,
        )
        size = {"num_seqs": max_num_seqs, "num_tokens": prompt_len + output_len}
        result = apart_bench.measure(order, lambda: _session(target, fields, plot, **size))
        emit(apart_bench, result, {**target.record(), "engine": fields}, json_file)
        return
    dtype = choose_dtype(EngineConfig(**fields).dtype, _platform()).name
    numbers = dtype if quantization is None else f"{quantization} and {dtype}"
    with tempfile.TemporaryDirectory(prefix="jaxinfer-compare-") as folder:
        shared = target
        if random_weights is not None:
            write_checkpoint(
                RandomStore(parse_model_config(target.fields()), target.seed), target.fields(), Path(folder)
            )
            shared = Target(model=folder, seed=target.seed)
        other = peers.load_peer(peer, shared.path(), dtype=dtype, platform=_platform(), quantization=quantization)
        if mixed:
            drawn = {"distribution": "uniform", "prompt_len": prompt_len, "output_len": output_len, "spread": spread}
            entries = workload.draw_trace(mixed, seed=target.seed, **drawn)
            longest = max(entry.prompt_len + entry.output_len for entry in entries)
            with _session(shared, fields, plot, num_seqs=_MIXED_SEQS, num_tokens=longest) as session:
                result = mixed_bench.measure(session, other, entries, dtype=numbers, repeats=repeats, seed=target.seed)
                settings = _settings(target, session.config) | {"num_requests": mixed} | drawn
                emit(mixed_bench, result, settings, json_file, plot)
            return
        with _session(shared, fields, plot, num_seqs=max(sizes), num_tokens=prompt_len + output_len) as session:
            result = compare_bench.measure(
                session,
                other,
                sizes,
                dtype=numbers,
                prompt_len=prompt_len,
                output_len=output_len,
                repeats=repeats,
                seed=target.seed,
            )
            emit(compare_bench, result, _settings(target, session.config), json_file, plot)


@app.command()
def kernels(
    *,
    backend: Annotated[str, typer.Option(help="of paged attention; several with commas, none for all")] = "",
    decode_rows: Annotated[int, typer.Option(min=0, help="of the timed decode step; 0: 4 on CPU, 128 elsewhere")] = 0,
    context: Annotated[int, typer.Option(min=0, help="KV positions of each; 0: 128 on CPU, 1024 elsewhere")] = 0,
    num_cases: Annotated[int, typer.Option(min=0, help="of the small ones, evenly spread; 0: all")] = 0,
    prompt_len: Annotated[int, typer.Option(min=0, help="of the timed prefill; 0: 256 on CPU, 8192 elsewhere")] = 0,
    json_file: JsonFile = "",
) -> None:
    """Check the backends of paged attention on this device against the reference and time them; exits with 1 if one is
    wrong."""
    from jaxinfer.bench import kernels as kernels_bench
    from jaxinfer.bench import report, step_kernels

    is_cpu = _platform() == "cpu"
    large = {
        "num_rows": decode_rows or (4 if is_cpu else 128),
        "context": context or (128 if is_cpu else 1024),
        "prompt_len": prompt_len or (256 if is_cpu else 8192),
    }
    backends = backend.split(",") if backend else []
    report.warn_if_busy()
    cases = kernels_bench.small_cases()
    cases = cases[:: -(-len(cases) // num_cases)] if num_cases else cases
    timed = kernels_bench.large_cases(**large)
    result = kernels_bench.measure(cases, timed, others=step_kernels.comparisons(), backends=backends)
    emit(kernels_bench, result, {"backends": backends, **large}, json_file)
    if not result.is_ok:
        raise typer.Exit(1)


@app.command()
def frames(
    rows: Annotated[int, typer.Option(min=1, help="requests that decode")] = 64,
    step_ms: Annotated[float, typer.Option(min=0.1, help="milliseconds of a step on the simulated device")] = 5.0,
    num_steps: Annotated[int, typer.Option(min=2, help="decode steps to time")] = 400,
    json_file: JsonFile = "",
) -> None:
    """Time the sending of steps to a second process, beside a simulated device, and whether that slows it down."""
    from jaxinfer.bench import frames as frames_bench
    from jaxinfer.bench import report

    report.warn_if_busy()
    result = frames_bench.measure(rows=rows, step_ms=step_ms, num_steps=num_steps)
    emit(frames_bench, result, {"num_steps": num_steps}, json_file)


@app.command()
def host(
    rows: Annotated[str, typer.Option(help="requests that decode; several with commas")] = "1,8,64,256,1024",
    waiting: Annotated[str, typer.Option(help="requests that wait for a slot; several with commas")] = "0,10,1000",
    num_steps: Annotated[int, typer.Option(min=1, help="decode steps to time for each line")] = 200,
    json_file: JsonFile = "",
) -> None:
    """Time what a decode step costs the host, with and without stop strings, over a wrapper that computes nothing."""
    from jaxinfer.bench import host as host_bench
    from jaxinfer.bench import report

    counts = _whole_numbers("rows", rows), _whole_numbers("waiting", waiting, least=0)
    report.warn_if_busy()
    result = host_bench.measure(rows=counts[0], waiting=counts[1], num_steps=num_steps)
    emit(host_bench, result, {"num_steps": num_steps}, json_file)


@_command
def steering(
    *,
    model: Model = DEMO,
    random_weights: RandomWeights = None,
    num_requests: Annotated[int, typer.Option(min=2, help="requests at once")] = 64,
    num_steered: Annotated[
        int | None, typer.Option(min=1, help="those that are steered, each by a vector of its own; half by default")
    ] = None,
    prompt_len: PromptLen = 32,
    output_len: OutputLen = 32,
    repeats: Repeats = 5,
    json_file: JsonFile = "",
    **fields: Any,
) -> None:
    """Time requests of which some are steered against plain ones, in turns."""
    from jaxinfer.bench import steering as steering_bench

    target = _target(model, random_weights, fields)
    steered = num_requests // 2 if num_steered is None else num_steered
    if steered > num_requests:
        raise ValueError(f"num_steered must be <= num_requests, got {steered} > {num_requests}")
    with _session(target, fields, None, num_seqs=num_requests, num_tokens=prompt_len + output_len) as session:
        result = steering_bench.measure(
            session,
            num_requests=num_requests,
            num_steered=steered,
            prompt_len=prompt_len,
            output_len=output_len,
            repeats=repeats,
            seed=target.seed,
        )
        emit(steering_bench, result, _settings(target, session.config), json_file)


@app.command()
def golden(
    directory: Annotated[Path, typer.Argument(help="folder of golden checkpoints")] = Path("tests/golden"),
    budget_seconds: Annotated[float, typer.Option(help="no further case is begun after that")] = 540,
    dtype: Annotated[str, typer.Option(help="ours: float32, bfloat16 or both with a comma")] = "float32",
    cases: Annotated[str, typer.Option(help="folders in it, with commas; none for all")] = "",
    json_file: JsonFile = "",
) -> None:
    """Compare tokens and log-probabilities on this device with those of transformers in float32; exits with 1 if a case
    fails.

    In bfloat16 tokens may differ where two are nearly equally likely.
    """
    from jaxinfer.bench import golden as golden_bench

    names = cases.split(",") if cases else []
    result = golden_bench.measure(directory, budget_seconds, dtypes=dtype.split(","), names=names)
    emit(golden_bench, result, {"directory": directory}, json_file)
    if not result.is_ok:
        raise typer.Exit(1)


@app.command()
def gpu(
    golden_directory: Annotated[Path, typer.Option("--golden", help="folder of golden checkpoints")] = Path(
        "tests/golden"
    ),
    configs: Annotated[Path, typer.Option(help="folder with the bench-*.json shapes")] = Path("configs"),
    budget_seconds: Annotated[float, typer.Option(help="what no longer fits is skipped, and said so")] = 330,
    sections: Annotated[str, typer.Option(help="their names with commas, in the order to run; none for all")] = "",
    tiny: Annotated[
        bool, typer.Option(help="a rehearsal with the smallest sizes, for a machine without a GPU")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="folder for tables, the profiler's files and XLA's description of the GPU")
    ] = None,
    json_file: Annotated[
        str, typer.Option("--json", callback=writable_file, help="all results, written again after each section")
    ] = "bench-gpu.json",
) -> None:
    """Run the checks of correctness and the benchmarks for a GPU (roofline, comparison with transformers, startup)
    within a time budget; short tables come last."""
    from jaxinfer.bench import gpu as gpu_bench
    from jaxinfer.bench import marks, report

    plan = gpu_bench.tiny_plan(golden_directory) if tiny else gpu_bench.full_plan(golden_directory, configs)
    chosen = gpu_bench.choose(plan, sections.split(",") if sections else [])
    outcomes = gpu_bench.run(
        chosen,
        budget_seconds,
        typer.echo,
        save=lambda outcomes: report.write_json(gpu_bench.to_json(outcomes), json_file),
        keep=keep,
    )
    records = {outcome.name: outcome.record for outcome in outcomes if outcome.record is not None}
    tables = f"{gpu_bench.render(outcomes)}\n\n{marks.render(records)}"
    typer.echo("\n" + tables)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / "summary.txt").write_text(tables + "\n", encoding="utf-8")
        typer.echo(gpu_bench.keep_target_config(keep))


def _sizes(text: str) -> list[int]:
    return _whole_numbers("batch_size", text)


def _whole_numbers(name: str, text: str, *, least: int = 1) -> list[int]:
    try:
        return [require_int(name, int(part), least) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} must be whole numbers >= {least} separated by commas, got {text!r}") from error


def _target(model: str, random_weights: Path | None, fields: dict[str, Any]) -> Target:
    from jaxinfer.bench.session import Target, given_config

    return Target(model=model, random_weights=random_weights, seed=given_config(fields).seed)


@contextlib.contextmanager
def _session(
    target: Target, fields: dict[str, Any], plot: Path | None, *, num_seqs: int, num_tokens: int
) -> Iterator[Session]:
    from jaxinfer.bench import report
    from jaxinfer.bench.session import Session, engine_config
    from jaxinfer.models.registry import parse_model_config

    if plot is not None:
        report.require_matplotlib()  # before minutes of measuring
    model_config = parse_model_config(target.fields())
    config = engine_config(fields, model_config, num_seqs=num_seqs, num_tokens=num_tokens)
    report.warn_if_busy()
    with Session(model_config, target.store(model_config), config) as session:
        yield session


def _platform() -> str:
    import jax

    return jax.default_backend()


def _settings(target: Target, config: EngineConfig) -> dict[str, Any]:
    return {**target.record(), "engine": dataclasses.asdict(config)}


def emit(bench: Any, result: Any, settings: dict[str, Any], json_file: str, plot: Path | None = None) -> None:
    """Prints a result as a table, unless JSON goes to standard output, and writes the files that were asked for."""
    from jaxinfer.bench import report

    if json_file != "-":
        typer.echo(bench.render(result))
    if json_file:
        command = bench.__name__.rpartition(".")[2]
        report.write_json(report.to_json(command, result, settings, report.environment()), json_file)
    if plot is not None:
        report.save_plot(functools.partial(bench.draw, result), plot)
