"""Proof by a second, slow implementation: run models layer by layer, and compare them."""
