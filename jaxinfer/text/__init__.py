"""Text around an engine that only knows ids: prompts become requests, tokens become text, stop strings end it."""
