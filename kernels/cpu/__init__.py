"""The CPU engine: C++ kernels (native/) for any N:M pattern and for dense layers, compiled where they run."""
