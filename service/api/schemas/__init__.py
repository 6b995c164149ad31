"""Request and response models, one module a group of routes."""
