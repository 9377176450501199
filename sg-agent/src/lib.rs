//! The agent: EC2 security groups, read from a control plane, kept real in the kernel.

pub mod model;
pub mod source;
