"""Who may call and how much: API keys, quotas, idempotency keys, import slots."""
