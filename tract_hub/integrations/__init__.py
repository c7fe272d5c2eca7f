"""TrAct in the Trainer of Transformers, and figures for any log."""
