//! Any frames, one after the other, through the whole way to a verdict, over tables that a few lines of rules stand
//! for. A second, plainer reading of each frame says what a verdict may be. The kernel's maps and programs are not
//! here: `tests/tests/kernel_properties.rs` has them.

#[path = "packet/plain.rs"]
mod plain;
#[path = "packet/world.rs"]
mod world;

use std::collections::BTreeSet;

use sg_common::abi::Direction;
use sg_common::verdict::{Drop, Pass, Verdict};

use plain::Flow;
use world::World;

/// Bytes before each frame: what is set and what crosses, the seconds that pass, the frame's length.
const HEADER: usize = 3;
/// Frames of one run.
const FRAMES: usize = 12;

/// Panics where a verdict is one that it mustn't be. The input is a byte of settings, then frames, each with a header.
pub fn check(data: &[u8]) {
    let Some((settings, mut rest)) = data.split_first() else { return };
    let mut world = World::new(*settings);
    let mut begun = Begun::default();
    for _ in 0..FRAMES {
        let Some((header, frames)) = rest.split_at_checked(HEADER) else { return };
        let direction = if header[0] & 1 == 0 { Direction::Ingress } else { Direction::Egress };
        // Offloaded packets are long; lengths past what is left mean all that is left.
        let length = usize::from(header[2]).min(frames.len());
        let (frame, after) = frames.split_at(length);
        world.wait(header[1]);
        world.change(header[0]);
        let before = world.clone();
        let verdict = world.judge(direction, frame);
        begun.check(&before, direction, frame, verdict);
        cut_and_padded(&before, direction, frame, verdict);
        rest = after;
    }
}

/// Nothing but the packet itself has a say: not what follows its end in the frame, and not what was cut off from it. But
/// what no rule is asked about, ARP and neighbour discovery, has nothing behind it.
fn cut_and_padded(before: &World, direction: Direction, frame: &[u8], verdict: Verdict) {
    assert_eq!(before.clone().judge(direction, frame), verdict, "the same packet in the same world");
    let end = plain::end(frame);
    if let (Ok(_), Some(end)) = (verdict, end) {
        assert_eq!(before.clone().judge(direction, &frame[..end]), verdict, "without what follows the packet");
        let padded = [frame, &[0x5a; 64]].concat();
        let padded = before.clone().judge(direction, &padded);
        if verdict == Ok(Pass::Neighbor) {
            let expected = if plain::is_arp(frame) { Drop::Malformed } else { Drop::ForgedNeighbor };
            assert_eq!(padded, Err(expected), "with more that follows the message");
        } else {
            assert_eq!(padded, verdict, "with more that follows the packet");
        }
    }
    // Every length of what is parsed, then some.
    for length in (0..frame.len().min(128)).chain((128..frame.len()).step_by(17)) {
        let cut = before.clone().judge(direction, &frame[..length]);
        if cut.is_ok() {
            let is_whole = cut == Ok(Pass::Neighbor) && matches!(verdict, Err(Drop::Malformed | Drop::ForgedNeighbor));
            assert!(cut == verdict || is_whole, "{length} of {} bytes say {cut:?}, not {verdict:?}", frame.len());
            assert!(end.is_none_or(|end| length >= end), "{length} bytes pass of a packet that ends at {end:?}");
        }
    }
}

/// What passed, as the plain reading has it.
#[derive(Default)]
struct Begun {
    flows: BTreeSet<Flow>,
    firsts: BTreeSet<(bool, plain::FragmentId)>,
}

impl Begun {
    /// Holds a verdict against what the rules say of the plain reading.
    fn check(&mut self, world: &World, direction: Direction, frame: &[u8], verdict: Verdict) {
        let is_egress = direction == Direction::Egress;
        assert_ne!(verdict, Err(Drop::Inconsistent), "tables that are all there");
        let Ok(pass) = verdict else { return };
        if pass == Pass::Neighbor && plain::is_arp(frame) {
            assert!(frame.len() <= 64 && frame[20] == 0 && matches!(frame[21], 1 | 2), "a tunnel: {frame:02x?}");
            return;
        }
        let packet = plain::read(frame).unwrap_or_else(|| panic!("{pass:?} for what is no packet"));
        if pass == Pass::Neighbor {
            assert!((133..=137).contains(&(packet.port >> 8)) && packet.protocol == 58 && packet.hops == 255);
            assert!(frame.len() <= 14 + 1280, "a tunnel of {} bytes", frame.len());
            assert!(!is_egress || frame.len() <= 14 + 40 + 56, "a tunnel of {} bytes", frame.len());
            return;
        }
        let own = if is_egress { packet.source } else { packet.destination };
        let peer = if is_egress { packet.destination } else { packet.source };
        if pass == Pass::Dhcp {
            assert!(packet.protocol == 17 && matches!(packet.port, 67 | 68 | 546 | 547), "{packet:?}");
            return;
        }
        if world.checks_addresses() {
            assert!(world::is_own(own), "{pass:?} for another's address {own}");
        }
        assert!(!peer.is_multicast() && !peer.is_loopback(), "{pass:?} for {peer}");
        if let Some(first) = packet.first {
            self.firsts.insert((is_egress, first));
        }
        let flow = packet.flow(is_egress);
        let here = world.allows(is_egress, peer, packet.protocol, packet.port);
        let there = world.allows(!is_egress, peer, packet.protocol, packet.source_port);
        match pass {
            Pass::New | Pass::MidFlow => assert!(here, "{pass:?} without a rule: {packet:?}"),
            // Its own rule, or that of the flow which it answers.
            Pass::Untracked => {
                assert!(here && (there || world.is_free(!is_egress, peer, packet.protocol)), "{packet:?}")
            }
            Pass::Exempt => assert!(is_egress && world::is_exempt(peer, packet.protocol, packet.port), "{packet:?}"),
            Pass::Established => {
                assert!(flow.is_some_and(|flow| self.flows.contains(&flow)), "established, and never begun: {packet:?}")
            }
            Pass::Related => assert!(packet.is_error(), "{packet:?}"),
            Pass::Fragment => {
                let rest = packet.rest.unwrap_or_else(|| panic!("a fragment that is none: {packet:?}"));
                assert!(self.firsts.contains(&(is_egress, rest)), "a fragment of what never passed: {packet:?}");
            }
            Pass::Proxied => assert!(!is_egress && world.mark() != 0),
            Pass::Neighbor | Pass::Dhcp => unreachable!("looked at above"),
        }
        if matches!(pass, Pass::New | Pass::Exempt | Pass::Proxied) && (pass != Pass::New || !packet.is_answer()) {
            self.flows.extend(flow);
        }
        let is_silent = matches!(pass, Pass::Exempt | Pass::Proxied | Pass::Established | Pass::Fragment);
        if !is_silent && pass != Pass::Related {
            assert!(world.acl_allows(is_egress, peer, packet.protocol, packet.port), "past the ACL: {packet:?}");
        }
    }
}
