"""Hold the finished code of the course, one module per chapter."""
