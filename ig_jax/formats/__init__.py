"""Files of other programs, read without those programs."""
