//! sg-agent: EC2 security groups, enforced by the kernel.
//!
//! A rule's way: [`source`] (R1) -> [`model`] (R2) -> [`resolve`] (R3) -> [`compile`] (R4) -> `apply` (R5).

pub mod apply;
pub mod compile;
pub mod datapath;
pub mod decide;
pub mod discovery;
pub mod exempt;
pub mod model;
pub mod oracle;
pub mod proxy;
pub mod resolve;
pub mod tables;
