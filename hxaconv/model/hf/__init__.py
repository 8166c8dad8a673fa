"""Modelling code that travels with every Hugging Face folder: two files, torch and transformers only."""
