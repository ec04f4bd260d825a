//! The table, and what of it the kernel keeps.
