//! The layout of checkpoints that bitsandbytes pre-quantised.
