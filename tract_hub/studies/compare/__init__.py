"""``tract-hub compare``: the same model from the same seeds, with and without TrAct."""
