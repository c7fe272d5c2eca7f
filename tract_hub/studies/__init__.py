"""Studies: does TrAct help (compare), what it costs (bench, inspect), what it finds (audit)."""
