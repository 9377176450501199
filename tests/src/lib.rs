//! What the tests of packets share: private namespaces, packets, the cast, the kernel's programs in a laboratory, and
//! a copy of the whole pipeline in memory to hold against them. Asserts nothing of its own.

pub mod cast;
pub mod lab;
pub mod netns;
pub mod packets;
pub mod reference;
pub mod text;
