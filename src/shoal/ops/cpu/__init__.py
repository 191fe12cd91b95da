"""The kernels for CPUs: half a block of few rows each, where PyTorch's calls cost more than arithmetic."""
