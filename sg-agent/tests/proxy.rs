//! The proxy on real sockets: who gets through, and what a change does. The rest is in modules by subject.

#[path = "proxy/alone.rs"]
mod alone;
#[path = "proxy/balancers.rs"]
mod balancers;
#[path = "proxy/bytes.rs"]
mod bytes;
#[path = "proxy/datagrams.rs"]
mod datagrams;
#[path = "proxy/fresh.rs"]
mod fresh;
#[path = "proxy/ports.rs"]
mod ports;
mod support;

use sg_agent::apply::Snapshot;
use sg_agent::proxy::OnRevoke;
use support::{Rules, Scene, ends_in_reset, is_reset, snapshot, talk, until};
use tokio::net::TcpListener;
use tokio::sync::watch;

const SOME: &str = "127.0.0.3";
const OTHER: &str = "127.0.0.4";

fn some() -> Rules {
    Rules::from(&["127.0.0.3/32"])
}

#[tokio::test]
async fn the_clients_own_address_decides() {
    let scene = Scene::new(some()).await;
    talk(&mut scene.connected(SOME).await).await;
    assert!(is_reset(OTHER, scene.at).await);
    assert!(!scene.is_knocked_at(), "a refused client must not reach the instance");
    let counters = scene.counters();
    assert_eq!((counters.accepted, counters.refused, counters.failed, counters.cut), (1, 1, 0, 0));
}

#[tokio::test]
async fn a_local_client_is_in_any_source_and_in_no_private_network() {
    let scene = Scene::new(Rules::from(&["10.0.0.0/8"])).await;
    assert!(is_reset("127.0.0.1", scene.at).await);
    scene.enforce(&Rules::from(&["0.0.0.0/0"]));
    talk(&mut scene.connected("127.0.0.1").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_counts_for_the_very_next_connection() {
    let scene = Scene::new(Rules::default()).await;
    for _ in 0..200 {
        scene.enforce(&some());
        talk(&mut scene.connected(SOME).await).await;
        scene.enforce(&Rules::default());
        assert!(is_reset(SOME, scene.at).await);
    }
    assert!(!scene.is_knocked_at());
    let counters = scene.counters();
    assert_eq!((counters.accepted, counters.refused, counters.cut), (200, 200, 0));
}

#[tokio::test]
async fn tracked_connections_outlive_a_revoke() {
    let scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    scene.enforce(&Rules::default());
    assert!(is_reset(SOME, scene.at).await);
    talk(&mut pair).await;
    assert_eq!(scene.counters().active, 1);
}

#[tokio::test]
async fn untracked_connections_end_with_their_rule() {
    let open = Rules { is_egress_free: true, ..Rules::from(&["0.0.0.0/0"]) };
    let scene = Scene::new(open.clone()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    // Another rule that covers it does as well.
    scene.enforce(&Rules { is_egress_free: true, ..some() });
    talk(&mut pair).await;
    scene.enforce(&Rules { is_egress_free: true, ..Rules::default() });
    assert!(ends_in_reset(&mut pair.0).await && ends_in_reset(&mut pair.1).await);
    until("the cut is counted", || scene.counters().cut == 1).await;
}

#[tokio::test]
async fn a_network_acl_ends_tracked_connections_too() {
    let scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    scene.enforce(&Rules { acl_denies: Some(vec!["127.0.0.4/32"]), ..some() });
    talk(&mut pair).await;
    scene.enforce(&Rules { acl_denies: Some(vec!["127.0.0.3/32"]), ..some() });
    assert!(ends_in_reset(&mut pair.0).await && ends_in_reset(&mut pair.1).await);
    assert!(is_reset(SOME, scene.at).await);
}

#[tokio::test]
async fn cut_ends_what_no_longer_passes_and_nothing_else() {
    let both = Rules::from(&["127.0.0.3/32", "127.0.0.4/32"]);
    let scene = Scene::with(both, 0, |proxy| proxy.on_revoke(OnRevoke::Cut)).await;
    let mut revoked = scene.connected(OTHER).await;
    let mut kept = scene.connected(SOME).await;
    talk(&mut revoked).await;
    scene.enforce(&some());
    assert!(ends_in_reset(&mut revoked.0).await && ends_in_reset(&mut revoked.1).await);
    talk(&mut kept).await;
    until("one is cut, one goes on", || (scene.counters().cut, scene.counters().active) == (1, 1)).await;
    // An instance that is gone is nothing that a client may talk to.
    scene.snapshots.send_replace(Snapshot::default().into());
    assert!(ends_in_reset(&mut kept.0).await);
}

#[tokio::test]
async fn clients_of_an_instance_that_is_gone_are_refused() {
    let scene = Scene::new(some()).await;
    scene.snapshots.send_replace(Snapshot::default().into());
    assert!(is_reset(SOME, scene.at).await);
    let mut unattached = Snapshot::clone(&snapshot(scene.instance, &some()));
    unattached.interfaces.update_all(|enforced| enforced.attached = false);
    scene.snapshots.send_replace(unattached.into());
    assert!(is_reset(SOME, scene.at).await);
    assert!(!scene.is_knocked_at());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (0, 2));
    scene.enforce(&some());
    talk(&mut scene.connected(SOME).await).await;
}

#[tokio::test]
async fn clients_of_a_port_that_the_instance_does_not_serve_are_reset() {
    let mut scene = Scene::new(some()).await;
    scene.server = TcpListener::bind("127.0.0.2:0").await.unwrap();
    assert!(is_reset(SOME, scene.at).await);
    until("the failure is counted", || scene.counters().active == 0).await;
    assert_eq!((scene.counters().accepted, scene.counters().failed), (1, 1));
}

#[tokio::test]
async fn without_an_applier_the_last_rules_stand() {
    let (sender, receiver) = watch::channel(snapshot(([127, 0, 0, 2], 9).into(), &some()));
    let mut scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    drop(std::mem::replace(&mut scene.snapshots, sender));
    drop(receiver);
    talk(&mut pair).await;
    assert!(is_reset(OTHER, scene.at).await);
    talk(&mut scene.connected(SOME).await).await;
}
