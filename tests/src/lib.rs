//! What tests share. Asserts nothing of its own, but for the probes of `e2e`, which say what was expected of them.

pub mod e2e;
