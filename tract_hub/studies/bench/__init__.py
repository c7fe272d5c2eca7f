"""What TrAct costs: time, memory, and how both grow."""
