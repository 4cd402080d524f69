"""Images on disk: which files of a folder are read, to which class each belongs, and how one becomes an RGB picture."""
