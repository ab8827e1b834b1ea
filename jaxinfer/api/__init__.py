"""The user's door: generate(), LLM and AsyncLLM, and the thread that drives the engine for them."""
