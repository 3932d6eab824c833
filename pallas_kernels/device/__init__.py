"""What the kernels share: per-thread values, barriers, tensor-core products, row formats."""
