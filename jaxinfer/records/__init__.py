"""How an output is written down: its record as a line of JSON, and its tokens as HTML for notebooks."""
