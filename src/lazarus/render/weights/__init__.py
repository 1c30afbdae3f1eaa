"""What weight-diff shows."""
