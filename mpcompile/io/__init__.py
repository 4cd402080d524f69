"""Files of a user: only regular ones are read, each is written as a whole or not at all, and content is validated."""
