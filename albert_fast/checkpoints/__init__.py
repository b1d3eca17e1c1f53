"""Reading and writing checkpoints, and the hub that they come from."""
