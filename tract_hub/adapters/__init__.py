"""Finding first layers: it knows the model zoos, and no mathematics."""
