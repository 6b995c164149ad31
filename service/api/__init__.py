"""HTTP: routes, request and response models, middleware. Nothing here imports a store."""
