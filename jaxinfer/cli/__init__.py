"""`jaxinfer ...`: the commands, and the flags that are views of the settings' fields."""
