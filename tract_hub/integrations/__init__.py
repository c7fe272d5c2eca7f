"""TrAct in the Trainer of Transformers, and in unmodified training scripts."""
