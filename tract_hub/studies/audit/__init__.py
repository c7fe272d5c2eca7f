"""``tract-hub audit``: the locator over a whole zoo."""
