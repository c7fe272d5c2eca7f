"""Training scripts, run as they are: what ``tract_hub.launch`` is made of."""
