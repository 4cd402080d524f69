"""Images and labels: files, folders and streams on disk, batches for a model, and the ranks that share them."""
