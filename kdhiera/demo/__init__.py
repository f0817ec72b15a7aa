"""The demo: real videos and weights from package registries, and a task made of them."""
