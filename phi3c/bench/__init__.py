"""How fast an artifact is, and how far that is from what the machine can do."""
