"""Token merging: matching and merge."""
