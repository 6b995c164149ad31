"""Export and import files of a tenant's memory."""
