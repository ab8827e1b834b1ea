"""Text around an engine that works on token ids: tokenises prompts, detokenises outputs, looks for stop strings."""
