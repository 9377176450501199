//! IPv4 options (RFC 791, 3.1): those that change nothing are stepped over, source routes end here.

use sg_common::abi::Direction;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, C, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{tcp, udp};

const NEW: Verdict = Ok(Pass::New);
const SOURCE_ROUTE: Verdict = Err(Drop::SourceRoute);
const MALFORMED: Verdict = Err(Drop::Malformed);

/// A route by way of C, loose or strict, with its pointer at the first stop or past the last one.
fn route(kind: u8, pointer: u8) -> Vec<u8> {
    [&[kind, 7, pointer], &C.v4.octets()[..]].concat()
}

#[test]
pub fn a_source_route_goes_neither_in_nor_out() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        for kind in [131, 137] {
            for pointer in [4, 8] {
                for before in [&[][..], &[1, 1, 1], &[148, 4, 0, 0], &[7, 7, 4, 0, 0, 0, 0, 1]] {
                    let options = [before, &route(kind, pointer)].concat();
                    let packet = |from, to| udp(from, to).options(&options);
                    assert_eq!(lab.from(B, &packet(B, A)), SOURCE_ROUTE, "RFC 791: {options:?}");
                    assert_eq!(lab.to(B, &packet(X, B)), SOURCE_ROUTE, "RFC 791: {options:?}");
                    // A service that nothing filters isn't a way round it, nor is a fragment.
                    let service = packet(B, X).to_address("169.254.169.253");
                    assert_eq!(lab.from(B, &service), SOURCE_ROUTE, "SG-4.1: {options:?}");
                    assert_eq!(lab.to(B, &packet(X, B).payload(64).as_fragment(1, 0, true)), SOURCE_ROUTE);
                    assert_eq!(lab.to(B, &packet(X, B).payload(64).as_fragment(1, 4, false)), SOURCE_ROUTE);
                }
            }
        }
        // Nor is turning the source/destination check off (SG-4.3).
        lab.edit(|inventory| {
            inventory.enis.get_mut(&B.eni()).expect("B's interface").source_dest_check = false;
        });
        assert_eq!(lab.from(B, &udp(B, A).options(&route(131, 4))), SOURCE_ROUTE, "SG-4.3");
        assert_eq!(lab.to(B, &udp(X, B).options(&route(137, 4))), SOURCE_ROUTE, "SG-4.3");
    });
}

#[test]
pub fn options_that_change_nothing_pass_and_hide_nothing() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 X/32, out none");
        for (number, options) in [
            // Nothing at all, up to the last word.
            vec![0; 4],
            vec![1; 40],
            // Router alert, timestamp, record route, a security label.
            vec![148, 4, 0, 0],
            [&[68, 36, 5, 0], &[0; 32][..]].concat(),
            [&[7, 39, 4], &[0; 36][..]].concat(),
            [&[130, 11], &[0; 9][..]].concat(),
            // A route's number within another option, or behind the end, is none.
            vec![68, 8, 9, 0, 131, 7, 4, 0],
            vec![0, 131, 7, 4],
            vec![1, 0, 137, 3],
            // What isn't known is stepped over.
            vec![99, 3, 131, 1],
            vec![99, 2, 99, 2],
        ]
        .into_iter()
        .enumerate()
        {
            let port = 40000 + number as u16;
            let syn = |to_port| tcp(X, B).ports(port, to_port).syn().options(&options);
            assert_eq!(lab.to(B, &syn(22)), NEW, "SG-1.2: {options:?}");
            assert_eq!(lab.to(B, &syn(23)), Err(Drop::NoRule), "SG-1.2: {options:?}");
            assert_eq!(lab.from(B, &syn(22).syn_ack().reply()), Ok(Pass::Established), "SG-3.1: {options:?}");
        }
    });
}

#[test]
pub fn options_that_cannot_be_stepped_over_are_malformed() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        for options in [
            vec![99, 0, 131, 7],
            vec![99, 1, 131, 7],
            vec![99, 5, 131, 7],
            vec![7, 255, 4, 0],
            vec![1, 1, 1, 99],
            vec![1, 1, 1, 7],
            vec![68, 4, 5, 0, 1, 1, 7, 3],
        ] {
            assert_eq!(lab.to(B, &udp(X, B).options(&options)), MALFORMED, "{options:?}");
            assert_eq!(lab.from(B, &udp(B, X).options(&options)), MALFORMED, "{options:?}");
        }
        // A route in the very last byte has no length, and is one all the same.
        assert_eq!(lab.to(B, &udp(X, B).options(&[1, 1, 1, 131])), SOURCE_ROUTE);
        // Every first byte with every length: nothing that the walk ends on is a default.
        for kind in 0..=255 {
            for length in 0..=12 {
                let mut options = [1; 12];
                (options[0], options[1]) = (kind, length);
                let verdict = lab.run(B, Direction::Ingress, &udp(X, B).options(&options).frame());
                match kind {
                    131 | 137 => assert_eq!(verdict, SOURCE_ROUTE),
                    0 | 1 => {
                        let is_bad_next = kind == 1 && !matches!(length, 0..=1);
                        // After a NOP the length is an option of its own, whose length is 1.
                        assert_eq!(verdict == MALFORMED, is_bad_next, "{kind} {length}");
                    }
                    _ => assert_eq!(verdict == MALFORMED, length < 2, "{kind} {length}: {verdict:?}"),
                }
            }
        }
    });
}
