"""Devices as a mesh, and everything that crosses between them."""
