"""What is written down of an output: its record as a line of JSON, its picture as HTML."""
