"""Many requests from a file of jobs, by several processes or machines."""
