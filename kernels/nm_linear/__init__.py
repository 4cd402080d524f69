"""N:M linear layers and convolutions: the reference in plain torch, and CPU and GPU engines in folders of their own."""
