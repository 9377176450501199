//! How much of a frame has to be at hand before it is judged. Judges nothing.

use super::{ETHERNET, Frame, IPV4, IPV6, JUDGED, TCP, UDP, ethernet};

/// How many bytes of a frame are enough to judge it, where that can be told at a glance: TCP or UDP behind an IP header
/// without options or extension headers. Of any other, more may be read.
#[inline(always)]
pub fn plain_headers(frame: &impl Frame) -> Option<u32> {
    let h: [u8; 10] = frame.load(ETHERNET)?;
    let (header, protocol) = match ethernet(frame).ok()?.ethertype {
        IPV4 if h[0] == 0x45 => (20, h[9]),
        IPV6 => (40, h[6]),
        _ => return None,
    };
    match protocol {
        TCP => Some(ETHERNET + header + JUDGED),
        UDP => Some(ETHERNET + header + 8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::packet::{ICMP, ip};
    use std::vec::Vec;

    /// A frame of which only the beginning can be read, as where the rest is in pages.
    struct Cut<'a>(&'a [u8], u32);

    impl Frame for Cut<'_> {
        fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
            (&self.0[..self.1 as usize]).load(offset)
        }
        fn len(&self) -> u32 {
            self.0.len() as u32
        }
    }

    /// A frame with 1,000 bytes behind its IP header, which look like a TCP header without options.
    fn frame(is_v4: bool, protocol: u8, options: u8) -> Vec<u8> {
        let mut frame = [2; 12].to_vec();
        let header = if is_v4 { 20 + options } else { 40 };
        if is_v4 {
            frame.extend([8, 0, 0x40 | (header / 4), 0]);
            frame.extend((u16::from(header) + 1_000).to_be_bytes());
            frame.extend([0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 1, 5, 10, 0, 1, 6]);
            frame.extend(std::iter::repeat_n(1, options.into()));
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(1_000_u16.to_be_bytes());
            frame.extend([protocol, 64]);
            frame.extend([0x20; 32]);
        }
        frame.extend([0x50; 1_000]);
        frame
    }

    #[test]
    fn what_is_said_to_be_enough_is_enough() {
        for (is_v4, protocol, enough) in [(true, TCP, 54), (true, UDP, 42), (false, TCP, 74), (false, UDP, 62)] {
            let bytes = frame(is_v4, protocol, 0);
            let ethernet = ethernet(&bytes.as_slice()).expect("an Ethernet header");
            assert_eq!(plain_headers(&bytes.as_slice()), Some(enough));
            let cut = Cut(&bytes, enough);
            assert_eq!(plain_headers(&cut), Some(enough));
            let packet = ip(&bytes.as_slice(), &ethernet).expect("a packet");
            assert_eq!(packet.protocol, protocol);
            assert_eq!(ip(&cut, &ethernet), Ok(packet));
        }
    }

    #[test]
    fn more_than_a_glance_takes_all() {
        const DESTINATION_OPTIONS: u8 = 60;
        let mut arp = frame(true, TCP, 0);
        arp[13] = 6;
        let others = [frame(true, TCP, 4), frame(true, ICMP, 0), frame(false, DESTINATION_OPTIONS, 0), arp];
        for bytes in others {
            assert_eq!(plain_headers(&bytes.as_slice()), None);
        }
        let bytes = frame(true, TCP, 0);
        assert_eq!(plain_headers(&Cut(&bytes, 20)), None);
    }
}
