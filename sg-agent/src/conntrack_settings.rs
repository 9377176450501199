//! The idle timeouts that the programs are given (SG-3.5).

use sg_common::conntrack::State;

const SECOND: u64 = 1_000_000_000;

/// Nanoseconds by [`State`], with these seconds where AWS lets them be set.
pub fn timeouts(tcp_established: u64, udp_stream: u64, udp: u64) -> [u64; 12] {
    let mut timeouts = State::DEFAULT_TIMEOUTS;
    timeouts[State::Established as usize] = tcp_established;
    timeouts[State::UdpStream as usize] = udp_stream;
    for state in [State::UdpOneWay, State::UdpExchange, State::UdpAgain] {
        timeouts[state as usize] = udp;
    }
    timeouts.map(|seconds| seconds * SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_settable_ones_are_set() {
        let set = timeouts(60, 61, 31);
        assert_eq!(set[State::Established as usize], 60 * SECOND);
        assert_eq!(set[State::UdpStream as usize], 61 * SECOND);
        assert_eq!(set[State::UdpAgain as usize], 31 * SECOND);
        assert_eq!(set[State::Other as usize], 600 * SECOND);
    }
}
