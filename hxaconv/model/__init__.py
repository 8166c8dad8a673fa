"""What a model is: its names, its config, the tensors it must have, and the plan of a checkpoint. Without torch."""
