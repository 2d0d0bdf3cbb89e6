"""Online serving by NVIDIA's Triton Inference Server: a model repository made of a bundle, and what runs in it."""
