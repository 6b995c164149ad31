"""Image towers: PyTorch, CUDA graphs, ONNX Runtime and OpenVINO, with the cache of exports."""
