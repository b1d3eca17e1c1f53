"""What CPUs and GPUs both use: the operators' benchmarks, the models and batches, the engines, and how a figure is made."""
