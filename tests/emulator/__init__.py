"""Runs the kernels' own Python code on a CPU: numpy in place of MLIR, 128 threads at a time."""
