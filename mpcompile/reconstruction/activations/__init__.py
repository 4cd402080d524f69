"""Activations of all samples in student and twin: where they come from, where they are held, how they move on."""
