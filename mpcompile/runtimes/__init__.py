"""Other runtimes behind one interface: dense and transformed models, run without our kernels."""
