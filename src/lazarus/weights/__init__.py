"""weight-diff: what changed in the weights, tensor pair by tensor pair."""
