"""Everything around the method: HTTP, tenants, batching, stores, metrics, command line. Imports core, never the reverse."""
