"""The student: a masked 3-D Hiera or a plain ViT, its heads and its export."""
