//! What the tests of packets share: private namespaces, packets, the cast, the kernel's programs in a laboratory, and
//! a copy of the whole pipeline in memory to hold against them; `race`, packets on all CPUs while the agent writes; `programs`, others' programs, and `bpf`, what root can do
//! to all that; and `e2e`, the agent as its users start it. Asserts nothing of its own, but for `e2e`'s probes, which say
//! what was expected of them.

pub mod bpf;
pub mod cast;
pub mod e2e;
pub mod lab;
pub mod netns;
pub mod packets;
pub mod programs;
pub mod race;
pub mod reference;
pub mod text;
