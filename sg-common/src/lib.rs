//! What the kernel and userspace share: the ABI of the BPF maps, the packet parser and the decisions.
//!
//! `no_std` and without allocation, because the eBPF programs compile it too. The kernel, the proxy, `explain` and
//! the tests call the same functions; they differ only in the [`policy::Tables`] that they bring.
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod abi;
pub mod addr;
pub mod conntrack;
pub mod early;
pub mod guard;
pub mod judge;
pub mod packet;
pub mod policy;
pub mod ranges;
pub mod reset;
pub mod verdict;
