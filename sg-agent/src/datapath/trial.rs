//! Frames through the loaded programs without a wire (BPF_PROG_TEST_RUN): for `explain --live` and the tests.

use aya::programs::{TestRun as _, TestRunOptions};
use sg_common::abi::Direction;

use super::{Datapath, DatapathError, classifier, program_name};

/// `struct __sk_buff` (include/uapi/linux/bpf.h) up to the last field that is set here. The kernel takes a shorter one
/// for one whose rest is zero, and refuses all but a few fields that aren't (`convert___skb_to_skb`).
#[repr(C)]
#[derive(Default)]
struct Context {
    len: u32,
    pkt_type: u32,
    mark: u32,
    queue_mapping: u32,
    protocol: u32,
    vlan_present: u32,
    vlan_tci: u32,
    vlan_proto: u32,
    priority: u32,
    ingress_ifindex: u32,
    ifindex: u32,
}

impl Datapath {
    /// Runs a frame, as if it crossed the link `ifindex` of this thread's network namespace with the `SO_MARK` `mark`.
    /// Flows and counters take note of it as of any other. Returns the program's action as it is (`TC_ACT_UNSPEC`
    /// passes, `TC_ACT_SHOT` drops).
    ///
    /// # Errors
    /// The kernel doesn't take the frame: it is shorter than an Ethernet header, or than the IP header that its
    /// ethertype promises, or there is no such link.
    pub fn run(&mut self, direction: Direction, ifindex: u32, mark: u32, frame: &[u8]) -> Result<u32, DatapathError> {
        let context = Context { mark, ifindex, ..Context::default() };
        // SAFETY: `Context` is eleven u32 without padding, so all of its bytes are initialised.
        let context = unsafe { std::slice::from_raw_parts((&raw const context).cast(), size_of::<Context>()) };
        let options = TestRunOptions { data_in: Some(frame), ctx_in: Some(context), ..TestRunOptions::default() };
        let result = classifier(&mut self.ebpf, direction)?
            .test_run(options)
            .map_err(|error| DatapathError::Program { program: program_name(direction), error: Box::new(error) })?;
        Ok(result.return_value)
    }
}
