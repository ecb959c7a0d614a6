"""Files of every format that is read or written, bounded by their size; none runs code."""
