"""Which backend runs an operator, how operators are registered, and the files that a process writes."""
