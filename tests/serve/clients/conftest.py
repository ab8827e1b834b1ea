"""What the tests of other people's clients share.

`pytest -m clients tests/serve/clients` runs them. Beside jaxinfer's extras [serve,test] they need:

  pip install langchain-openai instructor litellm 'lm-eval[api]' schemathesis llm-comply
  pip install 'pydantic-ai-slim[openai,anthropic]'

The last one wants another openai than langchain-openai does (from 3 on, and before 3), so it goes into an environment
of its own. The clients in JavaScript need node >= 20 and npm, which fetches what node/package.json names. A client that
is not installed is skipped.
"""

from __future__ import annotations

import pytest


@pytest.fixture
def url(served) -> str:
    """The address that clients of OpenAI's API take."""
    return f"{served[1].url}/v1"
