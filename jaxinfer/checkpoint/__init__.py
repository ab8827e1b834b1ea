"""Loads checkpoints, from files or arrays in memory to arrays on the mesh. Nothing in a checkpoint is ever executed."""
