"""Studies that measure what TrAct does; their libraries come with ``tract-hub[studies]``."""
