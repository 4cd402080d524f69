"""The intermediate representation: an owned torch.fx module, typed views of its layers, and the legal operators."""
