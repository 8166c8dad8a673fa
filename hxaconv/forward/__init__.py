"""The two architectures as slow, obvious forwards: the reference of every verification.

They share no code with the surgeries, and none with each other, so that each can be read alone.
"""
