"""Method `auto`: streaming statistics, whitening and the branches frozen from shots."""
