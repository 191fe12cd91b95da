"""Sources of the CPU kernels, in numba's Python. Only `ops/cpu/compile.py` imports them, in a process."""
