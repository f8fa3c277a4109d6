"""From a trained network to files."""
