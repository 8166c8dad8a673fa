"""Choosing the layers that stay attention: scores of layers, and the best choice under spacing rules."""
