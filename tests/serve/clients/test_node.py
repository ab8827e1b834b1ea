"""OpenAI's client in JavaScript and Vercel's AI SDK (needs node >= 20 and npm, which fetches node/package.json's)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
SOURCE = Path(__file__).parent / "node"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the packages are installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    path = tmp_path_factory.mktemp("node")
    shutil.copytree(SOURCE, path, dirs_exist_ok=True)
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=path, check=True, timeout=300)
    return path


def test_clients_in_javascript_get_what_they_expect(folder, url):
    command = ["node", "clients.mjs", url]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["models"] == ["demo"] and found["text"] == found["streamed"] == found["response"] == "Light."
    assert found["streamedCall"]["name"] == "weather"
    assert json.loads(found["streamedCall"]["arguments"]) == {"city": "Rome"}
    assert found["refused"] == {"status": 404, "code": "model_not_found"}
    assert found["ai"]["text"] == "Light." and found["ai"]["reasoning"] == "Hm." and found["ai"]["tokens"] > 0
    assert found["aiStream"]["text"] == "Light." and found["aiStream"]["reason"] == "stop"
    assert found["aiStream"]["tokens"] > 0
    assert found["aiRound"] == {"calls": [{"city": "Rome"}], "results": ["sun in Rome"], "text": "Sun."}
    assert found["aiForced"][0]["city"] in ("Rome", "Oslo") and found["aiStreamedCall"] == [{"city": "Rome"}]
    for name in ("aiObject", "aiStreamedObject"):
        assert found[name]["city"] in ("Rome", "Oslo") and isinstance(found[name]["rains"], bool)
