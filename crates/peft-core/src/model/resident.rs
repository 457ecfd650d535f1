//! A whole base in memory.
