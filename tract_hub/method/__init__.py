"""The mathematics of TrAct: it knows torch, and no model zoo."""
