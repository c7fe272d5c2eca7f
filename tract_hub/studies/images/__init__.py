"""Labelled images from anywhere, as tensors."""
