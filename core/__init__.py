"""The method: Dual Memory Networks over frozen encoders (Zhang et al., CVPR 2024, arXiv 2403.17589).

Tensors, memories, readout, fusion, encoder, replay. It knows no web, store, metrics, environment or clock.
"""
