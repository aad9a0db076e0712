"""Offline calibration: turn a Hugging Face LLM into a SliderQuant checkpoint. Never imports vLLM."""
