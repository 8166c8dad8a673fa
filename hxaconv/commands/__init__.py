"""One module per command: the function is the product, `cli.py` is its parser."""
