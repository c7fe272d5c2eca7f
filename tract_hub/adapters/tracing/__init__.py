"""Following the pixels through a forward that computes nothing: it knows no zoo."""
