//! Tensors of a model's folder, read from safetensors piece by piece.
