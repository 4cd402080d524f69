"""Image files on disk: folders, splits, archives, class maps, and one file of pixels."""
