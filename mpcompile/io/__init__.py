"""Files of a user: read as regular files, written whole or not at all, checked against a schema."""
