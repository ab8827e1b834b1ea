"""`jaxinfer serve` says what is wrong before it loads a model, and who can reach the server."""

import sys

import pytest
from typer.testing import CliRunner

from jaxinfer.cli import main as cli
from jaxinfer.cli.serve import _warning
from jaxinfer.serve import ServeConfig


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "port must be in 0..65535, got 70000"),
        (["--page-size", "9"], "page_size must be a power of two"),
        (
            ["--chat-template", "nothing.jinja"],
            r"--chat-template must be a file or the name .* \(default\), got nothing",
        ),
        (["--reply-format", "x", "--port", "0"], "reply_format must be one of auto, plain, think, hermes"),
        (["--ssl-certfile", "x"], "ssl_certfile and ssl_keyfile are given together"),
        (["--host", "300.1.1.1", "--port", "0"], "cannot listen on 300.1.1.1"),
    ],
)
def test_wrong_settings_are_said(flags, message):
    error = CliRunner().invoke(cli.app, ["serve", *flags]).exception
    assert isinstance(error, (ValueError, OSError))
    with pytest.raises(type(error), match=message):
        raise error


def test_missing_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jaxinfer.serve.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = CliRunner().invoke(cli.app, ["serve", "--port", "0"]).exception
    assert isinstance(error, ImportError) and "pip install 'jaxinfer[serve]'" in str(error)


@pytest.mark.parametrize(
    ("settings", "warns"), [({}, False), ({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_key": "k"}, False)]
)
def test_server_that_everybody_can_reach_is_warned_of(settings, warns):
    assert bool(_warning(ServeConfig(**settings))) == warns
