"""The one way out: what an output will hold is laid out, reserved, filled, read back, verified and published.

`run.save` is what commands call, `output.lay_out` decides what there will be, `writer` brings it about, `fill` is where
bytes are written, `staging` where they grow until the target gets its name.
"""
