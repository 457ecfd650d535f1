//! All-reduce, all-gather and broadcast: in one process and over TCP, behind one trait.
