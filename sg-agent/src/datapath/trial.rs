//! Frames through the loaded programs without a wire (BPF_PROG_TEST_RUN): for `explain --live` and the tests.

use aya::programs::{TestRun as _, TestRunOptions};
use sg_common::abi::Direction;

use super::{Datapath, DatapathError, classifier, program_name, published};

/// `struct __sk_buff` (include/uapi/linux/bpf.h) up to the last field that is set here. The kernel takes a shorter one
/// for one whose rest is zero, and refuses all but a few fields that aren't (`convert___skb_to_skb`).
#[repr(C)]
#[derive(Debug, Default)]
pub struct SkbContext {
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

impl SkbContext {
    /// That of a frame that crosses the link `ifindex` with the `SO_MARK` `mark`.
    pub fn new(ifindex: u32, mark: u32) -> Self {
        Self { mark, ifindex, ..Self::default() }
    }

    /// As BPF_PROG_TEST_RUN takes it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `SkbContext` is eleven u32 without padding, so all of its bytes are initialised.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
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
        let context = SkbContext::new(ifindex, mark);
        let options =
            TestRunOptions { data_in: Some(frame), ctx_in: Some(context.bytes()), ..TestRunOptions::default() };
        let result = classifier(&mut self.ebpf, direction)?
            .test_run(options)
            .map_err(|error| trial(program_name(direction), error))?;
        Ok(result.return_value)
    }

    /// Runs a frame through the program of published ports, as if it had come by the link `ifindex`: its action
    /// (`TC_ACT_REDIRECT` sends back), and the frame that it leaves.
    ///
    /// # Errors
    /// As for [`Self::run`].
    pub fn run_published(&mut self, ifindex: u32, frame: &[u8]) -> Result<(u32, Vec<u8>), DatapathError> {
        let context = SkbContext::new(ifindex, 0);
        let mut left = vec![0; frame.len() + ROOM];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut left),
            ctx_in: Some(context.bytes()),
            ..TestRunOptions::default()
        };
        let result = self.published()?.test_run(options).map_err(|error| trial(published::TC, error))?;
        left.truncate(result.data_size_out as usize);
        Ok((result.return_value, left))
    }

    /// The same by the program for drivers (`XDP_PASS`, `XDP_DROP`, and `XDP_TX` sends back).
    ///
    /// # Errors
    /// As for [`Self::run`].
    pub fn run_published_xdp(&mut self, frame: &[u8]) -> Result<(u32, Vec<u8>), DatapathError> {
        let mut left = vec![0; frame.len() + ROOM];
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut left), ..TestRunOptions::default() };
        let result = self.published_xdp()?.test_run(options).map_err(|error| trial(published::XDP, error))?;
        left.truncate(result.data_size_out as usize);
        Ok((result.return_value, left))
    }
}

/// A program may leave a frame that is longer than what came.
const ROOM: usize = 64;

fn trial(program: &'static str, error: aya::programs::ProgramError) -> DatapathError {
    DatapathError::Program { program, error: Box::new(error) }
}
