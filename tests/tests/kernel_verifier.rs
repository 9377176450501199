//! How much work the programs are to the verifier of the kernel that runs this: `docs/kernels.md` has what was measured.

use sg_agent::datapath::Datapath;
use sg_common::abi::{Config, Direction};
use tests::netns::isolated;

/// The verifier gives up after a million instructions (kernel: BPF_COMPLEXITY_LIMIT_INSNS), and kernels differ by a
/// factor of two or three about the same program.
const BUDGET: u32 = 250_000;

#[test]
fn the_programs_are_far_from_the_verifier_s_limit() {
    isolated(|| {
        for log_drops in [false, true] {
            // The maps are kept: programs that are loaded later refer to them.
            let (mut datapath, _maps) =
                Datapath::load(&Config::default(), None, log_drops).expect("programs that load");
            for direction in [Direction::Ingress, Direction::Egress] {
                let info = datapath.program(direction).and_then(|program| {
                    program.info().map_err(|error| panic!("no information about the {direction:?} program: {error}"))
                });
                let verified = info.expect("the program").verified_instruction_count().expect("Linux 5.16 or later");
                println!("{direction:?}, drops logged: {log_drops}: {verified} instructions");
                // Fewer than there are would be no measure of anything.
                assert!((1_000..BUDGET).contains(&verified), "{direction:?}: {verified} instructions");
            }
            let published = datapath.verified_published().expect("programs that load");
            for (program, verified) in ["published", "published_xdp"].into_iter().zip(published) {
                let verified = verified.expect("Linux 5.16 or later");
                println!("{program}, drops logged: {log_drops}: {verified} instructions");
                assert!((1_000..BUDGET).contains(&verified), "{program}: {verified} instructions");
            }
        }
    });
}
