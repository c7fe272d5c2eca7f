"""TrAct in the Trainer of Transformers."""
