//! Addresses that aren't one's own (SG-4.3), and neighbours that lie about theirs.

use std::net::IpAddr;

use tests::e2e::{Attempt, Lab, arp_reply, offloaded_datagram, run, send_frame, send_offloaded, wait_for};

#[test]
fn a_foreign_source_address_does_not_leave() {
    let everything = ["-1 - 0.0.0.0/0", "-1 - ::/0"];
    let mut lab = Lab::with(&["a", "b", "c"]).rules(|rules| rules.ingress("sg-b", &everything)).start();
    lab.serve("b", &[53]);
    let [v4, v6] = lab.addresses("b");
    let foreign: [IpAddr; 2] = ["10.0.1.99", "2001:db8:1::99"].map(|text| text.parse().expect("an address"));
    let a = lab.world.namespace("a");
    for (to, [own, neighbours, nobodys]) in [
        (v4, [lab.addresses("a")[0], lab.addresses("c")[0], foreign[0]]),
        (v6, [lab.addresses("a")[1], lab.addresses("c")[1], foreign[1]]),
    ] {
        Attempt::udp(a, to, 53).from_address(own).passes();
        let heard = lab.server("b", 53).datagrams();
        let dropped = lab.agent.packets("i-a", "egress", "source_address");
        for source in [neighbours, nobodys] {
            Attempt::udp(a, to, 53).spoofed(source).vanishes();
        }
        assert_eq!(lab.server("b", 53).datagrams(), heard, "nothing with a foreign source arrives at {to}");
        let now = lab.agent.packets("i-a", "egress", "source_address");
        assert!(now >= dropped + 2, "they were dropped where they left: {now}, {dropped} before");
    }
}

#[test]
fn a_neighbour_does_not_believe_forged_arp() {
    let lab = Lab::with(&["a", "b", "c"]).start();
    let [a, b, c] = ["a", "b", "c"].map(|name| lab.world.instance(name));
    // So an answer to no question is believed.
    b.namespace.sysctl("net/ipv4/conf/eth0/arp_accept", "1");
    let neighbours = || run(b.namespace.command("ip").args(["neigh", "show", &c.v4.to_string()]));
    assert_eq!(neighbours(), "");
    send_frame(&a.namespace, "eth0", &arp_reply(a.mac, c.v4, b.mac, b.v4));
    wait_for("the forged answer is dropped", || (lab.agent.packets("i-a", "egress", "forged_arp") == 1).then_some(()));
    assert_eq!(neighbours(), "");
    send_frame(&c.namespace, "eth0", &arp_reply(c.mac, c.v4, b.mac, b.v4));
    let mac = c.mac.map(|byte| format!("{byte:02x}")).join(":");
    wait_for("the honest one is believed", || neighbours().contains(&mac).then_some(()));
}

#[test]
fn a_foreign_mac_address_does_not_leave() {
    let everything = ["-1 - 0.0.0.0/0", "-1 - ::/0"];
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &everything)).start();
    lab.serve("b", &[53]);
    let [a, b] = ["a", "b"].map(|name| lab.world.instance(name));
    send_frame(&a.namespace, "eth0", &arp_reply([0x02, 0, 0x5e, 0, 0x53, 0xff], a.v4, b.mac, b.v4));
    wait_for("the frame with a foreign MAC address is dropped", || {
        let interface = lab.agent.interface("i-a");
        let counted = |reason: &str| interface["counters"]["egress"][reason]["packets"].as_u64().unwrap_or(0);
        (counted("source_mac") + counted("forged_arp") == 1).then_some(())
    });
    lab.udp("a", "b", 53)[0].passes();
}

#[test]
fn a_checksum_is_written_over_nothing_that_was_judged() {
    let everything = ["-1 - 0.0.0.0/0", "-1 - ::/0"];
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &everything)).start();
    lab.serve("b", &[53]);
    let [a, b] = ["a", "b"].map(|name| lab.world.instance(name));
    // So that the frames below need no neighbour discovery.
    lab.udp("a", "b", 53).iter().for_each(Attempt::passes);
    let arrived = || lab.server("b", 53).datagrams();
    let malformed = || lab.agent.packets("i-a", "egress", "malformed");
    for is_v4 in [true, false] {
        let header = if is_v4 { 20 } else { 40 };
        let transport = 14 + header;
        let frame = offloaded_datagram(a, b, is_v4, 53, b"honest");
        let before = arrived();
        send_offloaded(&a.namespace, "eth0", &frame, transport, 6);
        wait_for("a datagram with its checksum in its place", || (arrived() > before).then_some(()));

        let before = (arrived(), malformed());
        let forged = [
            ("the destination port", transport, 2),
            ("the source port", transport, 0),
            ("the datagram's length", transport, 4),
            ("half of the destination port", transport, 3),
            ("the last bytes of the destination address", transport - 2, 0),
            // The kernel takes no place before the first 20 bytes as the start (`virtio_net_hdr_to_skb`).
            ("the protocol", 20, if is_v4 { 2 } else { 0 }),
            ("the source address", 28, 0),
        ];
        let count = forged.len() as u64;
        for (what, start, offset) in forged {
            send_offloaded(&a.namespace, "eth0", &frame, start, offset);
            let dropped = malformed();
            println!("{what}: {dropped} malformed");
        }
        wait_for("each of them is dropped where it leaves", || (malformed() >= before.1 + count).then_some(()));
        assert_eq!(malformed(), before.1 + count, "one drop each");
        // What passes after them shows that none is still under way.
        send_offloaded(&a.namespace, "eth0", &frame, transport, 6);
        wait_for("an honest one after them", || (arrived() > before.0).then_some(()));
        assert_eq!(arrived(), before.0 + 1, "none of them arrived");
    }
}
