"""llm-comply, which checks answers against the specifications of the APIs (pip install llm-comply)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from compliant import compliant_server

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
NOT_HERE = {"Image Input"}
"""What the server refuses, since its models read text only."""


@pytest.fixture(scope="module")
def address(served):
    with compliant_server(served[0]) as address:
        yield address


@pytest.mark.parametrize(("form", "num_passed"), [("openai-chat", 7), ("anthropic", 7), ("open-responses", 11)])
def test_answers_are_as_specified(address, form, num_passed):
    if importlib.util.find_spec("llm_comply") is None:
        pytest.skip("llm-comply is not installed")
    command = [sys.executable, "-m", "llm_comply.cli", "-u", f"{address}/v1", "-m", "demo", "-k", "none", "--json"]
    done = subprocess.run([*command, "--format", form], capture_output=True, text=True, timeout=300, check=False)
    results = json.loads(done.stdout)["results"]
    wrong = {one["name"]: one["errors"] for one in results if one["status"] == "failed"}
    assert wrong.keys() <= NOT_HERE, wrong
    assert sum(one["status"] == "passed" for one in results) == num_passed
