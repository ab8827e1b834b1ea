"""Settings of the engine and numbers of a model, and the checks and errors that they share with other settings."""
