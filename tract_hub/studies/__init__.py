"""Studies of TrAct: does it help (compare), what it costs (bench, inspect), what it finds (audit)."""
