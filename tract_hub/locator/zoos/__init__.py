"""What each model zoo's images look like, and which first layers it declares."""
