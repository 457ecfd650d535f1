//! What tests share: a local cluster of real processes, fixtures, and readers of their logs.
