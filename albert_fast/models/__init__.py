"""ALBERT and its task heads, their configuration, losses and outputs."""
