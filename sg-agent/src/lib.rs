//! sg-agent: EC2 security groups, enforced by the kernel.
//!
//! A rule's way: [`source`] (R1) -> [`model`] (R2) -> [`resolve`] (R3) -> [`compile`] (R4) -> [`apply`] (R5).
//! The daemon drives it; the [`gateway`] has it wait for a change; the proxy and `explain` decide over what was applied.

pub mod apply;
pub mod cli;
pub mod compile;
pub mod conntrack_settings;
pub mod daemon;
pub mod datapath;
pub mod decide;
pub mod discovery;
pub mod early;
pub mod exempt;
pub mod explain;
pub mod gateway;
pub mod launcher;
pub mod live;
pub mod metrics;
pub mod model;
pub mod oracle;
pub mod privileges;
pub mod proxy;
pub mod render;
pub mod resolve;
pub mod sharing;
pub mod source;
pub mod status;
pub mod tables;
