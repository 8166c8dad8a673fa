"""Wrong checkpoints, and faults planted in the program: what the checks after an operation have to find."""
