//! Checkpoints: manifest, writer, reader, retention, over an object store.
