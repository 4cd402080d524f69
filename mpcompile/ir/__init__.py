"""The intermediate representation: an owned torch.fx module, typed views of its layers, and what it may hold."""
