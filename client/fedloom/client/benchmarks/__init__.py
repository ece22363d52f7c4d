"""What a training step costs: on a CPU by `fedloom bench dp-step`, on a GPU by `fedloom bench gpu`."""
