"""N:M linear and convolution: one file an engine, the reference beside them."""
