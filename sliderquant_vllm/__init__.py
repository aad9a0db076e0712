"""Serve SliderQuant checkpoints: the checkpoint format, the native ops and the vLLM quantization method."""
