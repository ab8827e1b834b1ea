"""Makes command-line flags from the fields of settings dataclasses, and reads the same settings from a YAML file.

Owns: one flag per field, with the field's text in the docstring as its help; merging a settings file with the flags.
Does not know: the commands, what a setting does.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
import yaml

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.field_help import field_help
from jaxinfer.config.generation_defaults import GenerationDefaults
from jaxinfer.config.keywords import unknown_keyword
from jaxinfer.sampling_params import IN_PYTHON_ONLY, SamplingParams

SETTINGS = (SamplingParams, EngineConfig)
"""Both classes have a field `seed`; the flag sets that of the first class, SamplingParams, as in generate()."""
_OF_THE_CHECKPOINT = {entry.name for entry in dataclasses.fields(GenerationDefaults)}
"""Names of the fields of GenerationDefaults. The sampling fields among them (temperature, top_k, top_p) come from the
checkpoint's generation_config.json if no flag is given."""


def takes_settings(
    *settings: type, defaults: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command one flag for every field of some dataclasses, and --config for a settings file.

    Args:
      settings: the dataclasses; if two have a field of the same name, the flag is that of the first.
      defaults: the command's own values for fields that are given neither in the file nor as flags.

    Returns:
      A decorator for a function with a parameter **fields, which receives only the fields that have a value: from the
      flags, otherwise from the file named by --config, otherwise from defaults. The file may also set those of the
      function's own parameters whose default is None.
    """
    options = _options(settings, defaults)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        known = [*options, *(parameter.name for parameter in own if parameter.default is None)]

        @functools.wraps(command)
        def wrapper(*, config: Path | None, **arguments: Any) -> Any:
            given = {name: _plain(name, value) for name, value in arguments.items() if value not in (None, [])}
            from_file = read_settings(config, known) if config is not None else {}
            for parameter in own:
                if from_file.get(parameter.name) is not None:
                    from_file[parameter.name] = _own_value(config, parameter, from_file[parameter.name])
            return command(**{**defaults, **from_file, **given})

        file = _parameter("config", Path | None, "YAML file with any of these settings by name; flags win over it.")
        parameters = sorted([*own, file, *options.values()], key=lambda parameter: parameter.kind)
        wrapper.__signature__ = inspect.Signature(parameters)  # pyrefly: ignore[missing-attribute]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def writable_file(file: str | Path | None) -> str | Path | None:
    """A typer callback for a file that a command writes at its end: refuses one that cannot be written at its start.

    Args:
      file: its path; None or "" for none and "-" for standard output are always right.

    Raises:
      OSError: it is a folder, lies in no folder, or may not be written.
    """
    if file is None or file in ("", "-"):
        return file
    path = Path(file)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {file}: it is a folder, expected a file")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {file}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"cannot write {file}: permission denied")
    return file


def read_settings(file: Path, known: Sequence[str]) -> dict[str, Any]:
    """Reads the settings in a YAML file.

    Args:
      file: a YAML file with a mapping of names to values.
      known: the names that are allowed.

    Raises:
      FileNotFoundError: there is no such file.
      TypeError: a name is unknown; the message names the file and the nearest known name.
      ValueError: the file is not YAML, or not a mapping.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such settings file: {file}")
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, Mapping):
        raise ValueError(f"{file} must hold a mapping of settings to values, got {type(fields).__name__}")
    for name in fields:
        if name not in known:
            raise TypeError(f"{file}: {unknown_keyword(name, known)}")
    return dict(fields)


def _own_value(file: Path | None, parameter: inspect.Parameter, value: Any) -> Any:
    """What a settings file gives to one of the command's own parameters, as the parameter's type.

    Raises:
      TypeError: it is of another type; the message names file and parameter.
      ValueError: it is below the least that the flag takes.
    """
    hint, option = typing.get_args(parameter.annotation)
    (kind,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if kind == list[str]:
        kind, value = list, [value] if isinstance(value, str) else value
        is_right = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    elif isinstance(value, bool):
        is_right = kind is bool
    else:
        is_right = isinstance(value, {Path: str, float: (int, float)}.get(kind, kind))
    if not is_right:
        expected = "a string or a list of strings" if kind is list else f"of type {kind.__name__}"
        raise TypeError(f"{file}: {parameter.name} must be {expected}, got {value!r}")
    if option.min is not None and value < option.min:
        raise ValueError(f"{file}: {parameter.name} must be >= {option.min}, got {value!r}")
    return kind(value)


def _options(settings: Sequence[type], defaults: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    options: dict[str, inspect.Parameter] = {}
    for one in settings:
        hints, texts = typing.get_type_hints(one), field_help(one)
        for entry in dataclasses.fields(one):
            if entry.name in IN_PYTHON_ONLY:
                continue
            text = texts[entry.name] + _default_help(one, entry, defaults)
            option = _parameter(entry.name, _flag_type(hints[entry.name]), text, one.__name__)
            options.setdefault(entry.name, option)
    return options


def _default_help(settings: type, entry: dataclasses.Field[Any], defaults: Mapping[str, Any]) -> str:
    if settings is SamplingParams and entry.name in _OF_THE_CHECKPOINT and entry.name not in defaults:
        return " (default: from the checkpoint's generation_config, greedy without one)"
    default = defaults.get(entry.name, entry.default)
    return "" if default is None else f" (default: {default})"


def _parameter(name: str, kind: Any, text: str, panel: str | None = None) -> inspect.Parameter:
    option = typer.Option(help=text, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _flag_type(hint: Any) -> Any:
    """The type that typer shall parse a field's flag as; it includes None, for a flag that is not given."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if any(map(dataclasses.is_dataclass, parts)):
        return str | None  # its fields as JSON
    for part in parts:
        if typing.get_origin(part) is Sequence:
            return list[typing.get_args(part)[0]] | None  # pyrefly: ignore[invalid-annotation]
        if typing.get_origin(part) is Mapping:
            return list[str] | None
    return parts[0] | None


def _plain(name: str, value: Any) -> Any:
    """Converts what typer parsed from a flag to the value of the field."""
    return _READERS[name](value) if name in _READERS else value


def _logit_bias(entries: Sequence[str]) -> dict[int, float]:
    try:
        return {int(key): float(bias) for key, bias in (entry.split("=") for entry in entries)}
    except ValueError as error:
        raise ValueError(f"logit_bias must be TOKEN_ID=BIAS, got {' '.join(entries)}") from error


def _xla_options(entries: Sequence[str]) -> dict[str, Any]:
    expected = f"xla_options must be NAME=VALUE, got {' '.join(entries)}"
    pairs = [entry.partition("=") for entry in entries]
    if not all(name and equals for name, equals, _ in pairs):
        raise ValueError(expected)
    try:
        return {name: yaml.safe_load(value) for name, _, value in pairs}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{expected}: {' '.join(str(error).split())}") from error


def _structured(text: str) -> dict[str, Any]:
    expected = f"""structured must be a JSON object such as {{"regex": "[0-9]+"}}, got {text}"""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(expected)
    return fields


_READERS: dict[str, Callable[[Any], Any]] = {
    "logit_bias": _logit_bias,
    "structured": _structured,
    "xla_options": _xla_options,
}
"""Converters for the fields whose flag takes text: KEY=VALUE pairs, and JSON for structured."""
