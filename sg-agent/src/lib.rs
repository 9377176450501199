//! sg-agent as a library: the stages from a control plane and containers to eBPF maps. No command line.

pub mod discovery;
pub mod model;
