"""The Python API: generate(), LLM and AsyncLLM, and the background thread that runs the engine for them."""
