"""Weight schemes: what a linear's weight is stored as."""
