//! Logs: structured, to the terminal and to one file a process.
