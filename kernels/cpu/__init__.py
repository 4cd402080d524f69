"""The CPU engine: C++ kernels (native/) for any N:M pattern and for dense layers, compiled on the machine that runs them."""
