"""The two architectures as slow, obvious forwards: what every conversion is judged by.

They share no code with the surgeries, and none with each other, so that each can be read alone.
"""
