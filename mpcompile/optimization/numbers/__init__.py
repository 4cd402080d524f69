"""The numbers of a search: damage and cost of every choice, measured or read, and the best choice for a budget."""
