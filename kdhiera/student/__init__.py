"""The student: a masked 3-D Hiera, its heads and its export."""
