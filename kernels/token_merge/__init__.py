"""Token merging: bipartite matching and size-weighted averages, in plain torch and in Triton."""
