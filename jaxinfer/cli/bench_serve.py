"""`jaxinfer bench serve`: the server against LLM.generate.

Owns: the command's flags.
Does not know: how it is measured (bench/serving.py, which is imported when the command runs).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.cli.bench import JsonFile, Model, OutputLen, PromptLen, Repeats, emit
from jaxinfer.cli.flags import takes_settings
from jaxinfer.config.engine_config import EngineConfig


@takes_settings(EngineConfig)
def bench_serve(
    *,
    model: Model = DEMO,
    num_streams: Annotated[int, typer.Option(min=1, help="requests at once")] = 32,
    prompt_len: PromptLen = 64,
    output_len: OutputLen = 64,
    repeats: Repeats = 3,
    beside: Annotated[
        str, typer.Option(metavar="URL", help="another server with the same model, which is asked the same in turns")
    ] = "",
    beside_model: Annotated[str, typer.Option(metavar="NAME", help="what that server calls the model")] = "bench",
    json_file: JsonFile = "",
    **fields: Any,
) -> None:
    """Time streams over HTTP against the same requests in LLM.generate, in turns."""
    from jaxinfer.api.llm import LLM
    from jaxinfer.bench import report
    from jaxinfer.bench import serving as serving_bench

    report.warn_if_busy()
    fields.setdefault("max_num_seqs", num_streams)
    config = EngineConfig(**fields)
    with LLM(model, **dataclasses.asdict(config)) as llm:
        sizes = {"num_streams": num_streams, "prompt_len": prompt_len, "output_len": output_len}
        other = {"beside": beside or None, "beside_model": beside_model}
        result = serving_bench.measure(llm, **sizes, repeats=repeats, seed=config.seed, **other)
        settings = {"model": model, **sizes, **other, "engine": dataclasses.asdict(llm.config)}
        emit(serving_bench, result, settings, json_file)
