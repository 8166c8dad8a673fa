"""From a plan to a published target: laid out, filled, journalled, verified, renamed.

`target` says what is wanted, `writer` runs it, `fill` is where bytes are written, `staging` where they grow
until the target gets its name.
"""
