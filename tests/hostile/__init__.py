"""Checkpoints that must be refused, each with the message that it must give."""
