"""`dmn evaluate`, `dmn replay`, `dmn classify` and `dmn train`: datasets, runs, reports."""
