"""The CPU engine: C++ kernels for any N:M, built on the machine that runs them."""
