"""Requests made from /openapi.json (pip install schemathesis)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from served_demo import SETTINGS

from jaxinfer.serve.config import ServeConfig
from jaxinfer.serve.http.server import BackgroundServer

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
NUM_EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "10"))
"""Cases of each operation beside those that cover its schema, about 200 per operation."""


def test_no_request_fails_the_server_and_answers_are_as_documented(served, tmp_path):
    command = shutil.which("st", path=Path(sys.executable).parent)
    if importlib.util.find_spec("schemathesis") is None or command is None:
        pytest.skip("schemathesis is not installed")
    config = ServeConfig(**SETTINGS, max_output_tokens=4, max_n=2, max_prompts=2)
    with BackgroundServer(served[0], config) as server:
        options = [
            "--checks",
            f"{CHECKS},unsupported_method,allow_header_conformance",
            "--max-examples",
            str(NUM_EXAMPLES),
        ]
        phases = ["--phases", "coverage,fuzzing", "--continue-on-failure", "--workers", "2", "--seed", "1"]
        done = subprocess.run(
            [command, "run", f"{server.url}/openapi.json", *options, *phases],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    (num_cases,) = re.findall(r"(\d+) generated", done.stdout)
    assert int(num_cases) > 1000
    print(f"{num_cases} cases")
