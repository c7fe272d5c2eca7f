"""Models by name, fitted to a study's images."""
