"""Sources of training examples, a file each."""
