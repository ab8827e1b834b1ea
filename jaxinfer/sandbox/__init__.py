"""Child processes with limits, for untrusted input: chat templates are rendered and grammars are tried in them."""
