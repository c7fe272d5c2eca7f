"""TrAct inside the training codes that people use; they connect, and compute nothing."""
