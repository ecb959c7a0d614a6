"""Search over sampling settings: the space, the race, and the report of it."""
