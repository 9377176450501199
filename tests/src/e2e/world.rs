//! A small isolated network: a host with a bridge, instances on it, and a client outside. Nothing of it is connected
//! to the machine's own network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Namespace;

/// A host with instances.
#[derive(Debug)]
pub struct World {
    /// Where the bridge and the host-side links are, and where the agent runs.
    pub host: Namespace,
    /// The instances, in the order in which they were named.
    pub instances: Vec<Instance>,
    /// Somebody far away, at 203.0.113.9 and 2001:db8:ffff::9, whose packets the host forwards.
    pub outside: Namespace,
}

/// One instance: a namespace behind a veth.
#[derive(Debug)]
pub struct Instance {
    /// What it is called; its id is `i-` and this.
    pub name: String,
    /// Its namespace.
    pub namespace: Namespace,
    /// The host-side link.
    pub link: String,
    /// Its addresses.
    pub v4: Ipv4Addr,
    /// The same in IPv6.
    pub v6: Ipv6Addr,
    /// Its MAC address.
    pub mac: [u8; 6],
}

impl Instance {
    /// Its id.
    pub fn id(&self) -> String {
        format!("i-{}", self.name)
    }

    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

impl World {
    /// Makes the network. The first instance gets 10.0.1.10, the next 10.0.1.20 and so on, and the same in IPv6.
    ///
    /// # Panics
    /// Where the kernel refuses.
    pub fn new(names: &[&str]) -> Self {
        super::need_root();
        let host = Namespace::new("host");
        host.sysctl("net/ipv4/ip_forward", "1");
        host.sysctl("net/ipv6/conf/all/forwarding", "1");
        host.ip("link add br0 type bridge mcast_snooping 0 forward_delay 0\n\
                 addr add 10.0.1.1/24 dev br0\n\
                 addr add 2001:db8:1::1/64 dev br0 nodad\n\
                 link set br0 up");
        let outside = Namespace::new("out");
        host.ip(&format!(
            "link add veth-out type veth peer name eth0 netns {}\n\
             addr add 203.0.113.1/24 dev veth-out\n\
             addr add 2001:db8:ffff::1/64 dev veth-out nodad\n\
             link set veth-out up",
            outside.name()
        ));
        outside.ip("addr add 203.0.113.9/24 dev eth0\n\
                    addr add 2001:db8:ffff::9/64 dev eth0 nodad\n\
                    link set eth0 up\n\
                    route add default via 203.0.113.1\n\
                    route add ::/0 via 2001:db8:ffff::1");
        let mut world = Self { host, instances: Vec::new(), outside };
        for (number, name) in (1..).zip(names) {
            let instance = Instance {
                name: (*name).to_owned(),
                namespace: Namespace::new(name),
                link: format!("veth-{name}"),
                v4: Ipv4Addr::new(10, 0, 1, number * 10),
                // Read as text, 10 and not 0x10 ends the address: the same digits as in IPv4.
                v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, u16::from(number) << 4),
                mac: [0x02, 0x00, 0x5e, 0x00, 0x53, number * 10],
            };
            world.instances.push(instance);
            world.plug(name);
        }
        world
    }

    /// Makes an instance's link, as it comes and goes with a container.
    ///
    /// # Panics
    /// Where the kernel refuses, or no instance has this name.
    pub fn plug(&self, name: &str) {
        let Instance { namespace, link, v4, v6, mac, .. } = self.instance(name);
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        self.host.ip(&format!(
            "link add {link} type veth peer name eth0 address {mac} netns {}\n\
             link set {link} master br0\n\
             link set {link} up",
            namespace.name()
        ));
        namespace.ip(&format!(
            "addr add {v4}/24 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via 10.0.1.1\n\
             route add ::/0 via 2001:db8:1::1"
        ));
    }

    /// Deletes an instance's link.
    ///
    /// # Panics
    /// When there is none.
    pub fn unplug(&self, name: &str) {
        self.host.ip(&format!("link del {}", self.instance(name).link));
    }

    /// The instance of that name.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn instance(&self, name: &str) -> &Instance {
        let found = self.instances.iter().find(|instance| instance.name == name);
        found.unwrap_or_else(|| panic!("no instance is called {name:?}"))
    }

    /// Where somebody is: an instance, `host` or `outside`.
    ///
    /// # Panics
    /// When there is nobody of that name.
    #[track_caller]
    pub fn namespace(&self, name: &str) -> &Namespace {
        match name {
            "host" => &self.host,
            "outside" => &self.outside,
            _ => &self.instance(name).namespace,
        }
    }
}
