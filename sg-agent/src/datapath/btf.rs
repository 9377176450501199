//! Where the running kernel keeps a field of its `struct sk_buff`, from the kernel's own description of its types (BTF:
//! `Documentation/bpf/btf.rst`). Rust has no relocations of the kind that C programs get for this, aya keeps its
//! reader of BTF to itself, and the crates that read it are under the LGPL, or keep every type of the kernel in memory.

use std::fs;
use std::io::{Error, ErrorKind, Result};

use sg_common::abi::{SKB_WINDOW, SkbLayout};

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;

/// The offsets in this kernel.
///
/// # Errors
/// Where the kernel doesn't describe itself (`CONFIG_DEBUG_INFO_BTF`), or its `sk_buff` has no such fields so close
/// together.
pub fn skb_layout() -> Result<SkbLayout> {
    let bytes = fs::read(VMLINUX).map_err(|error| Error::new(error.kind(), format!("{VMLINUX}: {error}")))?;
    let btf = Btf::parse(&bytes).ok_or_else(|| invalid("is not BTF"))?;
    let skb = btf.structure("sk_buff").ok_or_else(|| invalid("has no struct sk_buff"))?;
    let bits = |field: &str| {
        let bits = btf.field(skb, field).ok_or_else(|| invalid(&format!("struct sk_buff has no {field}")))?;
        u16::try_from(bits).map_err(|_| invalid(&format!("{field} of struct sk_buff is out of reach")))
    };
    let ip_summed = bits("ip_summed")?;
    let [summed, start, offset, frame] =
        [ip_summed, bits("csum_start")?, bits("csum_offset")?, bits("mac_header")?].map(|bits| bits / 8);
    let window = summed.min(start).min(frame);
    let end = summed.max(start + 3).max(frame + 1);
    if offset != start + 2 || usize::from(end - window) >= SKB_WINDOW {
        return Err(invalid(&format!(
            "has ip_summed, csum_start, csum_offset and mac_header of struct sk_buff at {summed}, {start}, {offset} and \
             {frame}, which the programs don't reach"
        )));
    }
    Ok(SkbLayout {
        window,
        ip_summed: summed - window,
        ip_summed_shift: ip_summed % 8,
        csum_start: start - window,
        mac_header: frame - window,
    })
}

fn invalid(problem: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("{VMLINUX} {problem}"))
}

/// The types of a kernel, as bytes.
struct Btf<'a> {
    /// Where each type begins; the first is `void`, which isn't there.
    types: Vec<&'a [u8]>,
    strings: &'a [u8],
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        if u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC || bytes.len() < HEADER {
            return None;
        }
        let section = |at: usize| {
            let start = word(bytes, 4)? as usize + word(bytes, at)? as usize;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        let (mut rest, strings) = (section(8)?, section(16)?);
        let mut types = vec![&rest[..0]];
        while !rest.is_empty() {
            types.push(rest);
            rest = rest.get(12 + behind(kind(rest)?, count(rest)?)?..)?;
        }
        Some(Self { types, strings })
    }

    fn structure(&self, name: &str) -> Option<&'a [u8]> {
        let is_it = |ty: &&&[u8]| kind(ty) == Some(KIND_STRUCT) && self.is_named(ty, name);
        self.types.iter().find(is_it).copied()
    }

    /// Bits from the start of `structure` to its field, which may be in an anonymous structure or union within.
    fn field(&self, structure: &[u8], name: &str) -> Option<u32> {
        let has_bit_fields = word(structure, 4)? >> 31 == 1;
        (0..count(structure)?).find_map(|place| {
            let member = structure.get(12 + 12 * place..)?;
            // The upper byte is a bit field's width.
            let bits = word(member, 8)? & if has_bit_fields { 0x00ff_ffff } else { u32::MAX };
            if self.is_named(member, name) {
                return Some(bits);
            }
            let inner = *self.types.get(word(member, 4)? as usize)?;
            let is_anonymous = word(member, 0)? == 0 && matches!(kind(inner), Some(KIND_STRUCT | KIND_UNION));
            if is_anonymous { Some(bits + self.field(inner, name)?) } else { None }
        })
    }

    /// Types and members begin with their name.
    fn is_named(&self, entry: &[u8], name: &str) -> bool {
        let text = word(entry, 0).and_then(|at| self.strings.get(at as usize..));
        text.is_some_and(|text| text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0)))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn kind(ty: &[u8]) -> Option<u32> {
    Some(word(ty, 4)? >> 24 & 0x1f)
}

fn count(ty: &[u8]) -> Option<usize> {
    Some(word(ty, 4)? as usize & 0xffff)
}

/// Bytes behind a type's first twelve.
fn behind(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        // Integer, variable, declaration tag.
        1 | 14 | 17 => 4,
        // Array.
        3 => 12,
        // Structure, union, section, 64-bit enumeration.
        KIND_STRUCT | KIND_UNION | 15 | 19 => 12 * count,
        // Enumeration, function prototype.
        6 | 13 => 8 * count,
        // Pointer, forward, typedef, volatile, const, restrict, function, float, type tag.
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A structure with a plain field, then a union of two fields, then a bit field, of 8-byte alignment.
    fn description() -> Vec<u8> {
        let strings = b"\0sk_buff\0int\0first\0start\0both\0summed\0";
        let at = |name: &str| {
            let name = format!("\0{name}\0");
            strings.windows(name.len()).position(|window| window == name.as_bytes()).unwrap() as u32 + 1
        };
        let types: Vec<u32> = [
            // 1: an integer.
            vec![at("int"), 1 << 24, 4, 32],
            // 2: the union.
            vec![0, 5 << 24 | 2, 4, at("start"), 1, 0, at("both"), 1, 0],
            // 3: the structure, with bit fields.
            vec![at("sk_buff"), 1 << 31 | 4 << 24 | 3, 16, at("first"), 1, 0, 0, 2, 64, at("summed"), 1, 2 << 24 | 101],
        ]
        .concat();
        let types: Vec<u8> = types.into_iter().flat_map(u32::to_le_bytes).collect();
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend([1, 0]);
        let header = [HEADER as u32, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        bytes.extend(header.into_iter().flat_map(u32::to_le_bytes));
        [bytes, types, strings.to_vec()].concat()
    }

    #[test]
    fn fields_are_found_in_anonymous_parts_too() {
        let bytes = description();
        let btf = Btf::parse(&bytes).unwrap();
        let skb = btf.structure("sk_buff").unwrap();
        let found = ["first", "start", "both", "summed", "absent", "fir"].map(|field| btf.field(skb, field));
        assert_eq!(found, [Some(0), Some(64), Some(64), Some(101), None, None]);
        assert!(btf.structure("sk_buf").is_none() && btf.structure("int").is_none());
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let bytes = description();
        for end in 0..bytes.len() {
            let Some(btf) = Btf::parse(&bytes[..end]) else { continue };
            panic!("{end} bytes of {}: {} types", bytes.len(), btf.types.len());
        }
    }

    #[test]
    fn this_kernel_describes_its_socket_buffers() {
        let layout = skb_layout().unwrap();
        let last = layout.ip_summed.max(layout.csum_start + 3).max(layout.mac_header + 1);
        assert!(usize::from(last) < SKB_WINDOW, "{layout:?}");
        assert!(layout.window > 0 && layout.mac_header > layout.csum_start, "{layout:?}");
    }
}
