//! One interface, a few rules and memory for flows and fragments: everything that a verdict needs, and nothing that
//! the agent compiles. The rules are a function, and the tables' look-ups are answered from it.

use std::cell::{RefCell, RefMut};
use std::collections::HashMap;
use std::net::IpAddr;

use sg_common::abi::{
    Binding, CUT_ON_REVOKE, Config, DELEGATED, Direction, Flow, FlowKey, Fragment, FragmentKey, Interface, Line,
    Member, NOWHERE, Policy, REFERENCES, RELATED_ERRORS, SOURCE_DEST_CHECK, free_replies,
};
use sg_common::addr::Address;
use sg_common::conntrack::State;
use sg_common::judge::{Full, Memory, judge};
use sg_common::packet::{ICMP, ICMPV6, Packet, TCP, UDP};
use sg_common::policy::{Tables, port_key};
use sg_common::verdict::Verdict;

/// The interface's number, its groups' binding and its ACL's.
const ENI: u32 = 7;
const GROUPS: u32 = 1;
const ACL: u32 = 2;
const VPC: u32 = 1;
/// The number of a group that rules refer to, and the row that it has.
const GROUP: u32 = 9;
const GROUP_ROW: u32 = 3;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
const IPV4: [u8; 4] = [10, 0, 1, 20];
const IPV6: [u8; 16] = [0x20, 1, 0x0d, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xb];
const DNS: [u8; 4] = [169, 254, 169, 253];
const DHCP: [u8; 4] = [10, 0, 1, 1];
/// What the packets of the agent's proxy are marked with, where it is on.
const MARK: u32 = 0x5347;
/// The port that the ACL denies beyond the subnet.
const DENIED_PORT: u16 = 23;
const SECOND: u64 = 1_000_000_000;

/// Bits of the settings.
const CHECKED: u8 = 1;
const WITH_ACL: u8 = 2;
const CUT: u8 = 4;
const RELATED: u8 = 8;
const FREE: u8 = 16;
const PROXY: u8 = 32;
const FEW_FLOWS: u8 = 64;

/// Everything that a verdict depends on.
#[derive(Clone)]
pub struct World {
    settings: u8,
    config: Config,
    interface: Interface,
    epoch: u32,
    mark: u32,
    now: u64,
    flows: RefCell<HashMap<FlowKey, Flow>>,
    fragments: RefCell<HashMap<FragmentKey, Fragment>>,
}

/// The interface's own addresses.
pub fn is_own(address: IpAddr) -> bool {
    [IpAddr::from(IPV4), IpAddr::from(IPV6)].contains(&address)
}

/// The services that nothing filters.
pub fn is_exempt(address: IpAddr, protocol: u8, port: u16) -> bool {
    protocol == UDP && [(IpAddr::from(DNS), 53), (IpAddr::from(DHCP), 67)].contains(&(address, port))
}

/// Where a peer is, which is its row: 1 near, 2 anywhere, and whether it is a group's member.
fn place(peer: IpAddr) -> (u32, bool) {
    match peer {
        IpAddr::V4(v4) => match v4.octets() {
            [10, 0, 1, last] => (1, last == 10),
            [10, 0, ..] => (1, false),
            _ => (2, false),
        },
        IpAddr::V6(v6) => {
            let near = v6.segments()[..3] == [0x2001, 0xdb8, 1];
            (if near { 1 } else { 2 }, near && v6.octets()[15] == 0xa)
        }
    }
}

impl World {
    /// With these settings, and nothing tracked.
    pub fn new(settings: u8) -> Self {
        let has = |bit| settings & bit != 0;
        let config = Config {
            timeouts: State::DEFAULT_TIMEOUTS.map(|seconds| seconds * SECOND),
            flags: if has(CUT) { CUT_ON_REVOKE } else { 0 } | if has(RELATED) { RELATED_ERRORS } else { 0 },
            world: 1,
            proxy_mark: if has(PROXY) { MARK } else { 0 },
            ..Config::default()
        };
        let interface = Interface {
            eni: ENI,
            groups: GROUPS,
            acl: if has(WITH_ACL) { ACL } else { 0 },
            vpc: VPC,
            flags: if has(CHECKED) { SOURCE_DEST_CHECK } else { 0 },
            born: 1,
            ipv4: Address::v4(IPV4),
            ipv6: Address::v6(IPV6),
            subnet4: Address::v4([10, 0, 1, 0]),
            mask4: Address::mask(96 + 24),
            subnet6: NOWHERE,
            mask6: Address::mask(128),
            mac: MAC,
            ..Interface::default()
        };
        let (flows, fragments) = (RefCell::default(), RefCell::default());
        Self { settings, config, interface, epoch: 1, mark: 0, now: SECOND, flows, fragments }
    }

    /// Lets time pass: seconds, and above 128 long enough for any flow to end.
    pub fn wait(&mut self, time: u8) {
        self.now += if time < 128 { u64::from(time) } else { 1_000_000 } * SECOND;
    }

    /// Before a frame: a mark that only the proxy has, and rules that were looked at again.
    pub fn change(&mut self, header: u8) {
        self.mark = if header & 2 != 0 && self.has(PROXY) { MARK } else { 0 };
        if header & 4 != 0 {
            self.epoch += 1;
        }
    }

    /// What becomes of a frame.
    pub fn judge(&self, direction: Direction, frame: &[u8]) -> Verdict {
        judge(self, &self.interface, direction, &frame, self.mark)
    }

    /// Whether others' addresses are refused.
    pub fn checks_addresses(&self) -> bool {
        self.has(CHECKED)
    }

    /// The mark of what crosses now.
    pub fn mark(&self) -> u32 {
        self.mark
    }

    /// What the groups' rules say of a packet from or to `peer`.
    pub fn allows(&self, is_egress: bool, peer: IpAddr, protocol: u8, port: u16) -> bool {
        let column = self.column_of(is_egress, port_key(peer.is_ipv4(), protocol, port));
        let (row, is_member) = place(peer);
        self.cell(is_egress, row, column) != 0 || (is_member && self.cell(is_egress, GROUP_ROW, column) != 0)
    }

    /// Whether replies in this direction need no tracking.
    pub fn is_free(&self, is_egress: bool, _peer: IpAddr, protocol: u8) -> bool {
        is_egress && self.has(FREE) && protocol == TCP
    }

    /// What the network ACL says.
    pub fn acl_allows(&self, _is_egress: bool, peer: IpAddr, protocol: u8, port: u16) -> bool {
        let is_in_subnet = matches!(peer, IpAddr::V4(v4) if v4.octets()[..3] == [10, 0, 1]);
        !self.has(WITH_ACL) || is_in_subnet || (protocol, port) != (TCP, DENIED_PORT)
    }

    fn has(&self, bit: u8) -> bool {
        self.settings & bit != 0
    }

    /// The rules' columns. In: SSH from near and the ACL's port from anywhere (1), web from the group (2), ping from
    /// anywhere (3), DNS from anywhere (4), GRE from near (5). Out: all TCP to anywhere where replies are free, else
    /// to near (6), and DNS (4).
    fn column_of(&self, is_egress: bool, key: u32) -> u32 {
        const V4_PING: u16 = ICMP as u16;
        const V6_PING: u16 = 0x100 | ICMPV6 as u16;
        const TCP_KEY: u16 = TCP as u16;
        const UDP_KEY: u16 = UDP as u16;
        match (is_egress, (key >> 16) as u16, key as u16) {
            (true, TCP_KEY, _) => 6,
            (true, UDP_KEY, 53) | (false, UDP_KEY, 53) => 4,
            (false, TCP_KEY, 22) => 1,
            (false, TCP_KEY, DENIED_PORT) => 7,
            (false, TCP_KEY, 443) => 2,
            (false, V4_PING, 0x0800) | (false, V6_PING, 0x8000) => 3,
            (false, 47, _) => 5,
            _ => 0,
        }
    }

    /// One cell: 0 for no, 1 for yes, 2 for yes by a rule with any source.
    fn cell(&self, is_egress: bool, row: u32, column: u32) -> u64 {
        match (is_egress, row, column) {
            (false, 1, 1 | 5) | (false, GROUP_ROW, 2) => 1,
            (false, 1 | 2, 3 | 4 | 7) => 2,
            (true, 1 | 2, 4) => 2,
            (true, 1 | 2, 6) if self.has(FREE) => 2,
            (true, 1, 6) => 1,
            _ => 0,
        }
    }
}

/// Of a table: the direction, or the ACL.
enum Table {
    Groups { is_egress: bool },
    Acl,
    Nobody,
}

fn table(number: u32) -> Table {
    match (number >> 1, number & 1) {
        (GROUPS, direction) => Table::Groups { is_egress: direction == 1 },
        (ACL, _) => Table::Acl,
        _ => Table::Nobody,
    }
}

impl Tables for World {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }

    fn binding(&self, index: u32) -> Binding {
        // Policies have their bindings' numbers.
        Binding { policy: index, epoch: self.epoch }
    }

    fn policy(&self, number: u32) -> Option<Policy> {
        let flags = match table(number) {
            Table::Groups { is_egress: true } if self.has(FREE) => free_replies(true, TCP) | free_replies(false, TCP),
            Table::Groups { is_egress: false } => REFERENCES,
            _ => 0,
        };
        Some(Policy { row_words: 1, size: 4 << 16 | 8, flags, ..Policy::default() })
    }

    fn line(&self, _: u32, _: u32) -> Option<&Line> {
        // The three below answer without.
        None
    }

    fn row(&self, number: u32, _: &Policy, peer: &Address) -> u32 {
        match table(number) {
            Table::Groups { .. } => place(IpAddr::from(*peer)).0,
            Table::Acl => 1,
            Table::Nobody => 0,
        }
    }

    fn column(&self, number: u32, _: &Policy, key: u32) -> u32 {
        match table(number) {
            Table::Groups { is_egress } => self.column_of(is_egress, key),
            Table::Acl if key == port_key(true, TCP, DENIED_PORT) => 2,
            Table::Acl => 1,
            Table::Nobody => 0,
        }
    }

    fn cells(&self, number: u32, _: &Policy, word: u32) -> u64 {
        match table(number) {
            Table::Groups { is_egress } => {
                (0..8).map(|column| self.cell(is_egress, word, column) << (column * 2)).sum()
            }
            Table::Acl => 1 << 2,
            Table::Nobody => 0,
        }
    }

    fn reference(&self, number: u32, group: u32) -> u32 {
        if matches!(table(number), Table::Groups { .. }) && group == GROUP { GROUP_ROW } else { 0 }
    }

    fn membership(&self, vpc: u32, peer: &Address) -> Option<&Member> {
        const MEMBER: Member = {
            let mut member = Member { count: 1, subnet: 0, groups: [0; 16] };
            member.groups[0] = GROUP;
            member
        };
        (vpc & DELEGATED == 0 && place(IpAddr::from(*peer)).1).then_some(&MEMBER)
    }

    fn has_own(&self, _: u32, _: &Address) -> bool {
        false
    }

    fn is_exempt(&self, _: u32, address: &Address, protocol: u8, port: u16) -> bool {
        is_exempt(IpAddr::from(*address), protocol, port)
    }
}

impl Memory for World {
    fn now(&self) -> u64 {
        self.now
    }

    fn hold<'a>(&'a self, packet: &'a Packet) -> Option<&'a Packet> {
        Some(packet)
    }

    type Entry<'a> = RefMut<'a, Flow>;

    fn flow(&self, key: &FlowKey) -> Option<RefMut<'_, Flow>> {
        RefMut::filter_map(self.flows.borrow_mut(), |flows| flows.get_mut(key)).ok()
    }

    fn add_flow(&self, key: &FlowKey, flow: &Flow) -> Result<Option<RefMut<'_, Flow>>, Full> {
        if let Some(old) = self.flow(key) {
            return Ok(Some(old));
        }
        let mut flows = self.flows.borrow_mut();
        if self.has(FEW_FLOWS) && flows.len() >= 2 {
            return Err(Full);
        }
        flows.insert(*key, *flow);
        Ok(None)
    }

    fn remove_flow(&self, key: &FlowKey) {
        self.flows.borrow_mut().remove(key);
    }

    fn add_fragment(&self, fragment: &Fragment) {
        self.fragments.borrow_mut().insert(fragment.key, *fragment);
    }

    fn remove_fragment(&self, key: &FragmentKey) {
        self.fragments.borrow_mut().remove(key);
    }

    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.fragments.borrow().get(key).copied()
    }
}
