//! Changes in the control plane that aren't about a group's rules.

use std::net::IpAddr;

use tests::e2e::{Attempt, element, run};

use crate::Stage;

#[test]
fn an_instance_that_is_stopped_or_terminated_is_no_member_any_more() {
    let mut stage = Stage::new();
    let (group_a, group_b) = (stage.moto.group(), stage.moto.group());
    stage.moto.authorize(&group_b, 22, &group_a);
    let (a, b) = (stage.instance("a", &[&group_a]), stage.instance("b", &[&group_b]));
    let mate = stage.instance("mate", &[&group_a]);
    stage.agent.start().wait();
    let _server = b.serve(22);
    a.tcp(&b, 22).passes();
    stage.moto.call("TerminateInstances", &[("InstanceId.1", &a.id)]);
    stage.agent.wait();
    a.tcp(&b, 22).vanishes();
    mate.tcp(&b, 22).passes();
    // A stopped one keeps its interface, its groups and its address, as in EC2.
    stage.moto.call("StopInstances", &[("InstanceId.1", &mate.id)]);
    stage.agent.wait();
    mate.tcp(&b, 22).passes();
    stage.moto.call("StartInstances", &[("InstanceId.1", &mate.id)]);
    stage.agent.wait();
    mate.tcp(&b, 22).passes();
}

#[test]
fn secondary_addresses_belong_to_the_interface() {
    let mut stage = Stage::new();
    let (group_a, group_b) = (stage.moto.group(), stage.moto.group());
    stage.moto.authorize(&group_b, 22, &group_a);
    let (a, b) = (stage.instance("a", &[&group_a]), stage.instance("b", &[&group_b]));
    let described = stage.moto.call("DescribeInstances", &[("InstanceId.1", &a.id)]);
    let eni = element(&described, "networkInterfaceId");
    stage.agent.start().wait();
    let server = b.serve(22);
    a.tcp(&b, 22).passes();
    // An address of the network that nobody has yet.
    let IpAddr::V4(v4) = a.v4 else { panic!("{} is IPv4", a.v4) };
    let [first, second, third, _] = v4.octets();
    let extra = IpAddr::from([first, second, third, 77]);
    let spoofed = Attempt::tcp(&a.namespace, b.v4, 22).spoofed(extra);
    let before = stage.agent.packets(&a.id, "egress", "source_address");
    spoofed.vanishes();
    assert!(stage.agent.packets(&a.id, "egress", "source_address") > before, "it isn't a's yet");
    let address = extra.to_string();
    stage.moto.call("AssignPrivateIpAddresses", &[("NetworkInterfaceId", &eni), ("PrivateIpAddress.1", &address)]);
    stage.agent.wait();
    assert!(stage.agent.interface(&a.id)["addresses"].to_string().contains(&address), "{address}");
    run(a.namespace.command("ip").args(["addr", "add", &format!("{address}/32"), "dev", "eth0"]));
    Attempt::tcp(&a.namespace, b.v4, 22).from_address(extra).passes();
    assert_eq!(server.accepted(), 2);
}

#[test]
fn a_prefix_list_changes_what_refers_to_it() {
    let mut stage = Stage::new();
    let moto = stage.moto;
    let (group_a, group_b) = (moto.group(), moto.group());
    let (a, b) = (stage.instance("a", &[&group_a]), stage.instance("b", &[&group_b]));
    let c = stage.instance("c", &[&group_a]);
    let (net_a, net_c) = (format!("{}/32", a.v4), format!("{}/32", c.v4));
    let name = tests::e2e::unique();
    let create =
        [("PrefixListName", &*name), ("MaxEntries", "5"), ("AddressFamily", "IPv4"), ("Entry.1.Cidr", &*net_a)];
    let list = element(&moto.call("CreateManagedPrefixList", &create), "prefixListId");
    moto.authorize(&group_b, 22, &list);
    stage.agent.start().wait();
    let _server = b.serve(22);
    a.tcp(&b, 22).passes();
    c.tcp(&b, 22).vanishes();
    let id = ("PrefixListId", &*list);
    moto.call(
        "ModifyManagedPrefixList",
        &[id, ("CurrentVersion", "1"), ("AddEntry.1.Cidr", &net_c), ("RemoveEntry.1.Cidr", &net_a)],
    );
    stage.agent.wait();
    c.tcp(&b, 22).passes();
    a.tcp(&b, 22).vanishes();
}
