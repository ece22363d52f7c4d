"""Where the metrics of rounds go: files, TensorBoard, MLflow."""
