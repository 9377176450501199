//! The gate at bridges: what a port sends and receives is dropped unless the port is admitted. It is a table of
//! nftables' (family `bridge`), because that is the one place where the kernel asks about frames of ports that nobody
//! has seen yet: a program hangs on links that are there, this on the bridge's own hooks. Who is admitted is `daemon`'s.
//!
//! Each change replaces the whole table by one transaction: at no moment is there none. It stays without the agent. A
//! directory on bpffs stands for it, so that who finds none has no reason to look.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use libc::c_int;
use netlink_packet_core::{
    DefaultNla, Emitable as _, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer,
    NetlinkHeader,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::errno::Errno;

use super::Pins;

/// What is let through.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Gate {
    /// The bridges at which it stands, by name: one that comes under its name is closed from its beginning.
    pub bridges: BTreeSet<String>,
    /// The indices of the ports that are admitted.
    pub ports: BTreeSet<u32>,
}

/// How far a gate reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// The bridges that it names.
    Named,
    /// Every bridge of this network namespace: the kernel can't tell whose port it is (no `nft_meta_bridge`).
    All,
}

impl Pins {
    /// Puts the gate up, in the place of an earlier one.
    ///
    /// # Errors
    /// The kernel's; what stood before stands then.
    pub fn close_bridges(&self, gate: &Gate) -> io::Result<Reach> {
        fs::create_dir_all(self.gate_mark())?;
        let named = self.write_gate(gate, Reach::Named);
        match named {
            // No such expression, or none with this key.
            Err(error) if [Some(libc::ENOENT), Some(libc::EOPNOTSUPP)].contains(&error.raw_os_error()) => {
                self.write_gate(gate, Reach::All).map(|()| Reach::All)
            }
            named => named.map(|()| Reach::Named),
        }
    }

    /// Whether the gate is where it was put.
    ///
    /// # Errors
    /// The kernel's.
    pub fn has_gate(&self) -> io::Result<bool> {
        let request = message(libc::NFT_MSG_GETTABLE, NLM_F_REQUEST | NLM_F_ACK, &text(TABLE_NAME, &self.gate_name()));
        absent(exchange(&[request])).map(|found| found.is_some())
    }

    /// Takes the gate away, if there is one. Whether there was.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open_bridges(&self) -> io::Result<bool> {
        let mark = self.gate_mark();
        if !mark.exists() {
            return Ok(false);
        }
        let name = text(TABLE_NAME, &self.gate_name());
        let delete = message(libc::NFT_MSG_DELTABLE, NLM_F_REQUEST | NLM_F_ACK, &name);
        let was_there = absent(transaction(&[delete]))?.is_some();
        fs::remove_dir(mark)?;
        Ok(was_there)
    }

    /// Stands for the gate.
    pub(super) fn gate_mark(&self) -> PathBuf {
        self.directory().join("gate")
    }

    /// Each agent of a machine has its own, known by its directory.
    fn gate_name(&self) -> String {
        format!("sg-agent{}", self.directory().display())
    }

    fn write_gate(&self, gate: &Gate, reach: Reach) -> io::Result<()> {
        let table = self.gate_name();
        let create = |kind, attributes: &[u8]| message(kind, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, attributes);
        // It is deleted and made again in one go: so there is one to be deleted.
        let mut messages = vec![
            create(libc::NFT_MSG_NEWTABLE, &text(TABLE_NAME, &table)),
            message(libc::NFT_MSG_DELTABLE, NLM_F_REQUEST | NLM_F_ACK, &text(TABLE_NAME, &table)),
            create(libc::NFT_MSG_NEWTABLE, &text(TABLE_NAME, &table)),
        ];
        let bridges = gate.bridges.iter().map(|name| padded(name)).collect::<Vec<_>>();
        let ports = gate.ports.iter().map(|port| port.to_ne_bytes().to_vec()).collect::<Vec<_>>();
        for (set, id, length, elements) in [("bridges", 1, NAME_LENGTH, bridges), ("ports", 2, 4, ports)] {
            let attributes = [
                text(SET_TABLE, &table),
                text(SET_NAME, set),
                number(SET_FLAGS, 0),
                number(SET_KEY_TYPE, 0),
                number(SET_KEY_LENGTH, length),
                number(SET_ID, id),
            ];
            messages.push(create(libc::NFT_MSG_NEWSET, &attributes.concat()));
            for some in elements.chunks(ELEMENTS_AT_ONCE) {
                let elements: Vec<u8> =
                    some.iter().flat_map(|key| nla(LIST_ELEMENT, &nla(ELEMENT_KEY, &nla(DATA_VALUE, key)))).collect();
                let attributes = [text(ELEMENTS_TABLE, &table), text(ELEMENTS_SET, set), nla(ELEMENTS_LIST, &elements)];
                messages.push(create(libc::NFT_MSG_NEWSETELEM, &attributes.concat()));
            }
        }
        // (kernel: `br_handle_frame`, `br_forward_finish`) All that comes by a port meets the former, all that leaves by one
        // the latter, but for what 802.1D keeps on its link, which is the host's own.
        let sides = [
            ("from", BRIDGE_PRE_ROUTING, libc::NFT_META_BRI_IIFNAME, libc::NFT_META_IIF),
            ("to", BRIDGE_POST_ROUTING, libc::NFT_META_BRI_OIFNAME, libc::NFT_META_OIF),
        ];
        for (chain, hook, bridge, port) in sides {
            let hook = [number(HOOK_NUMBER, hook), number(HOOK_PRIORITY, PRIORITY as u32)].concat();
            let attributes = [
                text(CHAIN_TABLE, &table),
                text(CHAIN_NAME, chain),
                nla(CHAIN_HOOK, &hook),
                text(CHAIN_TYPE, "filter"),
            ];
            messages.push(create(libc::NFT_MSG_NEWCHAIN, &attributes.concat()));
            let named = match reach {
                Reach::Named => [meta(bridge), lookup("bridges", 0)].concat(),
                Reach::All => Vec::new(),
            };
            let others = [meta(port), lookup("ports", libc::NFT_LOOKUP_F_INV as u32)].concat();
            let expressions = [named, others, expression("counter", &[]), drop()].concat();
            let attributes = [text(RULE_TABLE, &table), text(RULE_CHAIN, chain), nla(RULE_EXPRESSIONS, &expressions)];
            let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
            messages.push(message(libc::NFT_MSG_NEWRULE, flags, &attributes.concat()));
        }
        transaction(&messages)
    }
}

// include/uapi/linux/netfilter/nf_tables.h, which libc has in part.
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LENGTH: u16 = 5;
const SET_ID: u16 = 10;
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS_LIST: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const META_DESTINATION: u16 = 1;
const META_KEY: u16 = 2;
const LOOKUP_SET: u16 = 1;
const LOOKUP_SOURCE: u16 = 2;
const LOOKUP_FLAGS: u16 = 5;
const IMMEDIATE_DESTINATION: u16 = 1;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
/// The register that holds verdicts.
const REGISTER_VERDICT: u32 = 0;

// include/uapi/linux/netfilter_bridge.h
const BRIDGE_PRE_ROUTING: u32 = 0;
const BRIDGE_POST_ROUTING: u32 = 4;
/// Before everything else (`NF_BR_PRI_FIRST` is the lowest there can be; others may want to be there, too).
const PRIORITY: i32 = -1_000_000;

/// A link's name in a register (IFNAMSIZ).
const NAME_LENGTH: u32 = 16;
/// An attribute's length has 16 bits: about 24 bytes an element.
const ELEMENTS_AT_ONCE: usize = 1_000;

fn nla(kind: u16, value: &[u8]) -> Vec<u8> {
    let attribute = DefaultNla::new(kind, value.to_vec());
    let mut bytes = vec![0; attribute.buffer_len()];
    attribute.emit(&mut bytes);
    bytes
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    nla(kind, &value.to_be_bytes())
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    nla(kind, &[value.as_bytes(), b"\0"].concat())
}

/// A link's name as a register has it.
fn padded(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(NAME_LENGTH as usize, 0);
    bytes
}

fn expression(name: &str, data: &[u8]) -> Vec<u8> {
    nla(LIST_ELEMENT, &[text(EXPRESSION_NAME, name), nla(EXPRESSION_DATA, data)].concat())
}

/// Something about the frame, into the register.
fn meta(key: c_int) -> Vec<u8> {
    let data = [number(META_DESTINATION, libc::NFT_REG_1 as u32), number(META_KEY, key as u32)];
    expression("meta", &data.concat())
}

/// Goes on where the register's value is in the set, or (`NFT_LOOKUP_F_INV`) where it isn't.
fn lookup(set: &str, flags: u32) -> Vec<u8> {
    let data =
        [text(LOOKUP_SET, set), number(LOOKUP_SOURCE, libc::NFT_REG_1 as u32), number(LOOKUP_FLAGS, flags)].concat();
    expression("lookup", &data)
}

fn drop() -> Vec<u8> {
    let verdict = nla(DATA_VERDICT, &number(VERDICT_CODE, libc::NF_DROP as u32));
    expression("immediate", &[number(IMMEDIATE_DESTINATION, REGISTER_VERDICT), nla(IMMEDIATE_DATA, &verdict)].concat())
}

/// A message about this family's tables.
fn message(kind: c_int, flags: u16, attributes: &[u8]) -> Vec<u8> {
    let kind = ((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | kind as u16;
    framed(kind, flags, libc::NFPROTO_BRIDGE as u8, 0, attributes)
}

/// `struct nfgenmsg`: family 1, version 1, resource 2 (big-endian).
fn framed(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    let [high, low] = resource.to_be_bytes();
    let body = [&[family, 0, high, low], attributes].concat();
    let mut bytes = vec![0; header.buffer_len()];
    (header.length, header.message_type, header.flags) = ((bytes.len() + body.len()) as u32, kind, flags);
    header.emit(&mut bytes);
    bytes.extend(body);
    bytes
}

/// All of the messages or none.
fn transaction(messages: &[Vec<u8>]) -> io::Result<()> {
    let edge = |kind: c_int| framed(kind as u16, NLM_F_REQUEST, 0, libc::NFNL_SUBSYS_NFTABLES as u16, &[]);
    let begin = [edge(libc::NFNL_MSG_BATCH_BEGIN)];
    exchange(&[&begin, messages, &[edge(libc::NFNL_MSG_BATCH_END)]].concat())
}

/// Sends messages in one go, and reads what the kernel says to them: it has said all of it when sending returns.
fn exchange(messages: &[Vec<u8>]) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&messages.concat(), 0)?;
    let mut result = Ok(());
    let mut buffer = Vec::with_capacity(64 * 1024);
    loop {
        buffer.clear();
        match socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return result,
            Err(error) => return Err(error),
        }
        let mut rest = &buffer[..];
        while let Ok(answer) = NetlinkBuffer::new_checked(rest) {
            // `struct nlmsgerr` begins with the error's number, which is 0 where there is none.
            if answer.message_type() == NLMSG_ERROR
                && let Some(code) = rest.get(16..20).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes)
                && code != 0
                && result.is_ok()
            {
                result = Err(io::Error::from_raw_os_error(-code));
            }
            rest = rest.get((answer.length() as usize).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// What isn't there is none.
fn absent(result: io::Result<()>) -> io::Result<Option<()>> {
    match result {
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(None),
        result => result.map(Some),
    }
}
