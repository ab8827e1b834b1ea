"""`jaxinfer ablate`: runs the ablation that a YAML file describes.

Owns: the command's flags, reading the file.
Does not know: what an ablation does (bench/ablation.py, which brings JAX, and is imported when the command runs).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from jaxinfer.cli.flags import writable_file

if TYPE_CHECKING:
    from jaxinfer.bench.ablation import Ablation


def ablate(
    file: Annotated[Path, typer.Argument(help="a YAML file, such as those in configs/ablations")],
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each setting, after one that is not")] = 3,
    json_file: Annotated[
        str, typer.Option("--json", callback=writable_file, help="write all figures; - for stdout")
    ] = "",
    plot: Annotated[Path | None, typer.Option(callback=writable_file, help="write a PNG (needs matplotlib)")] = None,
) -> None:
    """Run one workload under several engine settings: speed, memory and outputs side by side.

    Exits with 1 if outputs differ that must be equal.
    """
    from jaxinfer.bench import ablation as ablation_bench
    from jaxinfer.bench import report

    planned = read_ablation(file)
    if plot is not None:
        report.require_matplotlib()  # before minutes of measuring
    report.warn_if_busy()
    result = ablation_bench.measure(planned, repeats=repeats, directory=file.parent)
    if json_file != "-":
        typer.echo(ablation_bench.render(result))
    if json_file:
        settings = dataclasses.asdict(planned)
        report.write_json(report.to_json("ablate", result, settings, report.environment()), json_file)
    if plot is not None:
        report.save_plot(functools.partial(ablation_bench.draw, result), plot)
    if not result.is_ok:
        raise typer.Exit(1)


def read_ablation(file: Path) -> Ablation:
    """Reads an ablation's file.

    Raises:
      FileNotFoundError: there is no such file.
      TypeError, ValueError: it is not YAML, or a field is unknown, missing or wrong; the message names the file.
    """
    from jaxinfer.bench.ablation import Ablation

    if not file.is_file():
        raise FileNotFoundError(f"no such ablation: {file}")
    try:
        fields: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Ablation.of(fields)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error
