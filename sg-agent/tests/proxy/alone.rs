//! In a network namespace of the test's own thread, where the whole host is the test's.

use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use socket2::SockRef;

use crate::support::{Scene, is_reset, publish, talk};
use crate::{OTHER, SOME, some};

/// Runs a test there. The namespace goes with the thread.
fn run(test: impl Future<Output = ()> + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a network namespace needs CAP_SYS_ADMIN, a socket's mark CAP_NET_ADMIN");
        return;
    }
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        // An accepted socket takes the mark of the packet that began it, and so shows it. This directory is that of
        // the namespace of the thread that opens it (`net_ctl_header_lookup` in `net/sysctl_net.c`).
        std::fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1").unwrap();
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn connections_to_the_instance_carry_the_mark() {
    const MARK: u32 = 0x5347;
    run(async {
        let scene = Scene::with(some(), MARK, |proxy| proxy).await;
        let (client, server) = scene.connected(SOME).await;
        assert_eq!(SockRef::from(&server).mark().unwrap(), MARK);
        assert_eq!(SockRef::from(&client).mark().unwrap(), 0);
        let unmarked = Scene::with(some(), 0, |proxy| proxy).await;
        let (_client, server) = unmarked.connected(SOME).await;
        assert_eq!(SockRef::from(&server).mark().unwrap(), 0);
    });
}

#[test]
fn a_dual_stack_socket_judges_ipv4_clients_as_such() {
    run(async {
        let mut scene = Scene::new(some()).await;
        let mut published = publish(scene.at, scene.instance);
        published.bind = vec!["::".parse().unwrap()];
        assert_eq!(scene.proxy.reconcile(vec![published]).await, []);
        talk(&mut scene.connected(SOME).await).await;
        assert!(is_reset(OTHER, scene.at).await);
        assert!(is_reset("::1", ([0, 0, 0, 0, 0, 0, 0, 1], scene.at.port()).into()).await);
    });
}

#[test]
fn all_addresses_of_both_families_can_be_apart() {
    run(async {
        let mut scene = Scene::new(some()).await;
        let mut published = publish(scene.at, scene.instance);
        published.bind = vec!["::".parse().unwrap(), "0.0.0.0".parse().unwrap()];
        assert_eq!(scene.proxy.reconcile(vec![published]).await, []);
        talk(&mut scene.connected(SOME).await).await;
    });
}
