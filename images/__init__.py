"""Hold every picture of the course, and the code that draws it."""
