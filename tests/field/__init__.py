"""Checkpoints as people really have them, rebuilt with small random weights: each is read, or refused with a cure."""
