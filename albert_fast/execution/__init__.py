"""How a forward is run: CUDA graphs and their capture."""
