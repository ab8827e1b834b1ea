"""The command line `jaxinfer ...`: its commands, and their flags, which are made from the settings dataclasses."""
