//! Everything numeric: quantisation, layers, models, adapters, losses, optimizers.
