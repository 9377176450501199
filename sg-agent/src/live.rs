//! `explain --live`: the question as a packet, put through the programs that are attached.

use std::net::IpAddr;

use sg_common::abi::{Direction, Flow, FlowKey};
use sg_common::addr::Address;
use sg_common::conntrack::State;
use sg_common::packet::{self, ETHERNET, ICMP, ICMPV6, TCP, UDP};

use crate::apply::{Applier, Enforced};
use crate::datapath::DatapathError;
use crate::explain::{Explanation, Query};

/// `TC_ACT_SHOT` (include/uapi/linux/pkt_cls.h).
const SHOT: u32 = 2;
/// `BPF_EXIST` (include/uapi/linux/bpf.h): an entry is replaced, none is made.
const EXISTING: u64 = 2;
/// Ports of no particular meaning; a flow that is there already is passed over.
const SOURCE_PORTS: std::ops::RangeInclusive<u16> = 61_000..=61_063;
/// Somebody else's MAC address, locally administered.
const PEER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0xfe];

/// Asks the kernel about every gate of an explanation, and notes what it says. Each costs one counted packet; the flow
/// that it makes is over at once.
///
/// # Errors
/// The kernel doesn't run the packet.
pub fn verify(applier: &mut Applier, query: &Query, explanation: &mut Explanation) -> Result<(), DatapathError> {
    let snapshot = applier.snapshot();
    for gate in &mut explanation.gates {
        let found = snapshot.interfaces.iter().find(|(_, enforced)| enforced.interface.link == gate.link);
        let Some((&ifindex, enforced)) = found else { continue };
        let is_ingress = gate.direction == Direction::Ingress.name();
        let direction = if is_ingress { Direction::Ingress } else { Direction::Egress };
        let Some(own) = enforced.interface.addresses.iter().find(|own| own.is_ipv4() == gate.peer.is_ipv4()) else {
            continue;
        };
        for source_port in SOURCE_PORTS {
            let frame = frame(enforced, direction, *own, gate.peer, query, source_port);
            let key = flow_key(enforced, direction, &frame);
            let (datapath, maps) = applier.datapath();
            if key.is_some_and(|key| maps.flows.get(&key, 0).is_ok()) {
                continue;
            }
            let passes = datapath.run(direction, ifindex, 0, &frame)? != SHOT;
            if let Some(key) = key {
                // Not removed: the programs count entries, and so does the sweep that takes this one out.
                let over = Flow { state: State::Reset as u8, ..Flow::default() };
                let _ = maps.flows.insert(key, over, EXISTING);
            }
            gate.kernel = Some(passes);
            break;
        }
    }
    explanation.kernel_disagrees = explanation.gates.iter().any(|gate| gate.kernel.is_some_and(|k| k != gate.allowed));
    Ok(())
}

fn flow_key(enforced: &Enforced, direction: Direction, frame: &[u8]) -> Option<FlowKey> {
    let ethernet = packet::ethernet(&frame).ok()?;
    let packet = packet::ip(&frame, &ethernet).ok()?;
    FlowKey::of(enforced.entry.eni, direction, &packet)
}

/// The first packet of the flow that is asked about. Checksums are zero: the programs don't look at them, and the frame
/// goes nowhere.
fn frame(
    enforced: &Enforced,
    direction: Direction,
    own: IpAddr,
    peer: IpAddr,
    query: &Query,
    source_port: u16,
) -> Vec<u8> {
    let (source, destination, source_mac, destination_mac) = match direction {
        Direction::Ingress => (peer, own, PEER_MAC, enforced.interface.mac),
        Direction::Egress => (own, peer, enforced.interface.mac, PEER_MAC),
    };
    let transport = transport(query.protocol, source_port, query.port);
    let mut frame = Vec::with_capacity(ETHERNET as usize + 40 + transport.len());
    frame.extend(destination_mac);
    frame.extend(source_mac);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.extend(packet::IPV4.to_be_bytes());
            let total = (20 + transport.len()) as u16;
            frame.extend([0x45, 0]);
            frame.extend(total.to_be_bytes());
            frame.extend([0, 0, 0, 0, 64, query.protocol, 0, 0]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        _ => {
            frame.extend(packet::IPV6.to_be_bytes());
            frame.extend([0x60, 0, 0, 0]);
            frame.extend((transport.len() as u16).to_be_bytes());
            frame.extend([query.protocol, 64]);
            frame.extend(Address::from(source).octets());
            frame.extend(Address::from(destination).octets());
        }
    }
    frame.extend(transport);
    frame
}

fn transport(protocol: u8, source_port: u16, port: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    match protocol {
        TCP => {
            bytes.extend(source_port.to_be_bytes());
            bytes.extend(port.to_be_bytes());
            bytes.extend([0; 8]);
            bytes.extend([5 << 4, packet::SYN, 0xff, 0xff, 0, 0, 0, 0]);
        }
        UDP => {
            bytes.extend(source_port.to_be_bytes());
            bytes.extend(port.to_be_bytes());
            bytes.extend([0, 8, 0, 0]);
        }
        ICMP | ICMPV6 => {
            bytes.extend(port.to_be_bytes());
            bytes.extend([0, 0]);
            bytes.extend(source_port.to_be_bytes());
            bytes.extend([0, 0]);
        }
        _ => bytes.extend([0; 8]),
    }
    bytes
}
