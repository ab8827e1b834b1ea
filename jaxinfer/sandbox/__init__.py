"""Child processes for what a stranger wrote: chat templates, and the confinement that they and grammars run in."""
