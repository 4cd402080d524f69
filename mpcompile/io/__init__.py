"""User files: only regular files are read, each file is written whole or not at all, and content is validated."""
