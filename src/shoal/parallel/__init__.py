"""Many processes, one run: the mesh of their degrees, and a model cut over it."""
