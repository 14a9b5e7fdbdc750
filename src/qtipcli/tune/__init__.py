"""What tuning needs and no stage owns: layers with fixed weights, the parameters that move, Adam's steps, activations."""
