//! Layers: forward and backward written out by hand, over the backend's operations.
//!
//! A layer owns no memory and no weights. It is handed views and writes into views; what its backward pass needs from
//! the forward pass is said in its doc comment.

pub mod attention;
pub mod embedding;
pub mod inputs;
pub mod linear;
pub mod mlp;
pub mod rms_norm;
pub mod rope;
