"""The kernels, one noun a file: torch, triton and one another. Only `ops.dispatch` names them."""
