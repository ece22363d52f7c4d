"""A run's result as files that other programs serve: PEFT, whole models, ONNX, GGUF, and the hub."""
