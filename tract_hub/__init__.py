"""TrAct for the first layer of every published vision model."""
