"""Connects TrAct to the code that people train with; no mathematics, no searching."""
