"""The porch: routes and what goes over the wire. It never imports a store."""
