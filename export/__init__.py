"""From checkpoints to bundles: encoders, checkpoint readers, ONNX export and its proof. Needs the `export` extra."""
