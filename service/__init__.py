"""Everything around the method: HTTP, tenants, batching, stores, metrics, command line.

It imports core; core never imports it.
"""
