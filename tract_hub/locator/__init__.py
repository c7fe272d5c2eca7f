"""Find a model's first layers: this package knows the model zoos, and no mathematics."""
